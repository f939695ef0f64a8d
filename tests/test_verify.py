"""`robustlearn verify` on files that are made here, and on published instances."""

import json
import math

import numpy as np
import pytest
import torch

import robustlearn as rl
from robustlearn.certify import vnnlib
from robustlearn.certify.bounds import Deadline
from robustlearn.certify.complete import Property, decide
from robustlearn.certify.relax import Region
from robustlearn.cli import run
from robustlearn.models import onnx as reader
from robustlearn.models.trace import trace

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def saved(path, nodes, weights, shape):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in weights.items()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.fixture
def absolute(tmp_path):
    """y = (|x₀| + |x₁|, 1) by four ReLU."""
    first = [[1, -1, 0, 0], [0, 0, 1, -1]]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b", "c"], ["y"], transB=1),
    ]
    weights = {"a": first, "b": [[1, 1, 1, 1], [0, 0, 0, 0]], "c": [0, 1]}
    return saved(tmp_path / "net.onnx", nodes, weights, (2,))


def written(path, unsafe, low=-0.4, high=0.4):
    box = "\n".join(
        f"(declare-const X_{i} Real)\n(assert (>= X_{i} {low}))\n(assert (<= X_{i} {high}))"
        for i in range(2)
    )
    path.write_text(
        f"; a property\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n{box}\n{unsafe}\n"
    )
    return path


@pytest.mark.parametrize(
    ("unsafe", "answer"),
    [
        ("(assert (>= Y_0 Y_1))", "unsat"),  # |x₀| + |x₁| ≤ 0.8
        ("(assert (>= Y_0 0.79))", "sat"),
        ("(assert (or (and (>= Y_0 Y_1)) (and (<= Y_0 -0.01))))", "unsat"),
        ("(assert (or (and (>= Y_0 0.5) (<= Y_0 0.6)) (and (<= Y_1 0.5))))", "sat"),
        ("(assert (and (>= Y_0 0.5) (<= Y_0 0.4)))", "unsat"),
        ("(assert (<= Y_0 -1e-3))", "unsat"),
    ],
)
def test_answers(absolute, tmp_path, unsafe, answer, capsys):
    rule = written(tmp_path / "p.vnnlib", unsafe)
    assert run(["verify", str(absolute), str(rule), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == answer
    if answer == "sat":
        x = np.array(result["x"])
        assert (np.abs(x) <= 0.4).all()
        np.testing.assert_allclose(result["y"], [np.abs(x).sum(), 1], atol=1e-6)
        assert run(["verify", str(absolute), str(rule)]) == 0
        assert capsys.readouterr().out.startswith("sat\n((X_0 ")


def test_no_time_is_unknown(absolute, tmp_path, capsys):
    rule = written(tmp_path / "p.vnnlib", "(assert (>= Y_0 0.5))(assert (<= Y_0 0.4))")
    assert run(["verify", str(absolute), str(rule), "--seconds", "0"]) == 0
    assert capsys.readouterr().out == "unknown\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("(assert (>= Y_0 Y_7))", "Y_7"),
        ("(assert (>= X_0 X_1))", "relates"),
        ("(assert (= Y_0 1))", "expected"),
        ("(assert (>= Y_0 1)", "not closed"),
        ("(define-fun f () Real 1)", "declare-const and assert"),
        ("(assert (>= X_5 0))(assert (>= Y_0 1))", "each of the 2 inputs"),
    ],
)
def test_what_a_property_cannot_say(tmp_path, text, told):
    with pytest.raises(rl.InputError, match=told):
        vnnlib.read(written(tmp_path / "p.vnnlib", text), (2,), 2)


def test_operators_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(1, 2, 3, 2, 1), torch.nn.BatchNorm2d(2).eval()
    bn.running_mean[:], bn.running_var[:] = torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0])
    linear = torch.nn.Linear(2 * 9, 2)
    weights = {
        "k": conv.weight, "kb": conv.bias, "s": bn.weight, "t": bn.bias, "m": bn.running_mean,
        "v": bn.running_var, "w": linear.weight.T, "b": linear.bias,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "k", "kb"], ["1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["1", "s", "t", "m", "v"], ["2"]),
        helper.make_node("LeakyRelu", ["2"], ["3"], alpha=0.1),
        helper.make_node("MaxPool", ["3"], ["4"], kernel_shape=[2, 2], strides=[1, 1]),
        helper.make_node("Flatten", ["4"], ["5"]),
        helper.make_node("MatMul", ["5", "w"], ["6"]),
        helper.make_node("Add", ["6", "b"], ["y"]),
    ]
    path = saved(tmp_path / "c.onnx", nodes, {k: v.detach() for k, v in weights.items()}, (1, 8, 8))
    x = torch.rand(3, 1, 8, 8)
    here = torch.nn.Sequential(
        conv, bn, torch.nn.LeakyReLU(0.1), torch.nn.MaxPool2d(2, 1), torch.nn.Flatten(), linear
    )
    read = reader.read(path)
    torch.testing.assert_close(read(x), here(x))
    torch.testing.assert_close(trace(read, x)(x.double()).float(), here(x))


def test_files_that_are_no_network(tmp_path):
    path = tmp_path / "n.onnx"
    path.write_bytes(b"not a network")
    with pytest.raises(rl.InputError, match="not a readable ONNX file"):
        reader.read(path)
    saved(path, [helper.make_node("Softmax", ["x"], ["y"])], {}, (2,))
    with pytest.raises(rl.InputError, match="Softmax"):
        reader.read(path)


@pytest.mark.data
def test_published_instances(data_folder):
    """VNN-COMP 2021, mnist_fc 256x2: the verdicts on which many verifiers agree."""
    listed = json.loads((data_folder / "verification" / "vnncomp2021.json").read_text())
    rows = [r for r in listed if r["net"] == "mnist-net_256x2.onnx"][1:16:2]
    with np.load(data_folder / "images" / "mnist.npz") as file:
        images = file["x_test"]
    network = None
    module = reader.read(data_folder / "verification" / "mnist-net_256x2.onnx")
    for row in rows:
        x = torch.as_tensor(images[row["index"]].reshape(1, 784, 1) / np.float32(255))
        network = network or trace(module, x)
        region = Region(x.double(), rl.LpBall(math.inf, row["eps"], lower=0.0, upper=1.0))
        with torch.no_grad():
            found = decide(
                network, region, Property.of_class(row["label"], 10), dtype=torch.float32,
                deadline=Deadline.after(60),
            )  # fmt: skip
        assert {"certified": "unsat", "falsified": "sat"}[found.status] == row["verdict"]
