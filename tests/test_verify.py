"""`robustlearn verify` on files that are made here, and on published instances."""

import json
import math

import numpy as np
import pytest
import torch

import robustlearn as rl
from robustlearn.certify.bounds import Deadline
from robustlearn.certify.complete import Property, decide
from robustlearn.certify.relax import Region
from robustlearn.cli import run, vnnlib
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
        ("(assert (<= Y_1 1.0))(assert (>= Y_0 0.7))", "sat"),  # Y_1 is 1
        ("(assert (or (and (>= X_0 1) (<= Y_0 9)) (and (<= X_0 0.1) (>= Y_0 0.9))))", "unsat"),
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


@pytest.mark.parametrize("fixed", ["0.1", "-0.3", "0.25"])
def test_a_fixed_input_may_be_no_number_of_float32(absolute, tmp_path, fixed, capsys):
    fix = f"(assert (<= X_0 {fixed}))(assert (>= X_0 {fixed}))"
    for least, answer in ((0.4, "sat"), (0.8, "unsat")):
        rule = written(tmp_path / "p.vnnlib", f"{fix}(assert (>= Y_0 {least}))")
        assert run(["verify", str(absolute), str(rule), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["answer"] == answer
    assert run(["verify", str(absolute), str(rule), "--seconds", "nan"]) == 2
    assert "seconds must be a number in [0, inf]" in capsys.readouterr().err


def test_queries_share_the_time(tmp_path, capsys, monkeypatch):
    """One that takes all it is given, before one that is answered at once."""
    from robustlearn.certify.complete import Verdict
    from robustlearn.cli import verification

    given = []

    def hard(network, region, rule, *, dtype, deadline):
        given.append(deadline.left)
        return Verdict("open", "branch and bound", -1.0)

    monkeypatch.setattr(verification, "decide", hard)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["y"])]
    net = saved(tmp_path / "net.onnx", nodes, {"a": np.eye(2)}, (2,))
    unsafe = "(assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= X_0 0) (>= Y_0 0))))"
    assert run(["verify", str(net), str(written(tmp_path / "p", unsafe)), "--seconds", "60"]) == 0
    assert capsys.readouterr().out == "unknown\n"
    assert 29 < given[0] <= 30
    assert 59 < given[1] <= 60  # what is left


def test_no_time_is_unknown(absolute, tmp_path, capsys):
    rule = written(tmp_path / "p.vnnlib", "(assert (>= Y_0 0.5))(assert (<= Y_0 0.4))")
    assert run(["verify", str(absolute), str(rule), "--seconds", "0"]) == 0
    assert capsys.readouterr().out == "unknown\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("(assert (>= Y_0 Y_7))", "Y_7"),
        ("(assert (>= X_0 X_1))", "relates"),
        ("(assert (>= X_0 Y_1))", "relates"),
        ("(assert (<= (+ Y_0 Y_1) 1.0))", r"got \(\+ Y_0 Y_1\)"),
        ("(assert (<= Y_0 abc))", "finite number; got abc"),
        ("(assert (<= Y_0 nan))", "finite number; got nan"),
        ("(assert (<= X_0 inf))", "finite number; got inf"),
        ("(assert (<= Y_-1 0.5))", "got Y_-1"),
        ("(assert (>= Y_0 1) (>= Y_1 1))", "declare-const and assert"),
        ("(assert Y_0)", "got Y_0"),
        ("(assert ((<= Y_0 1)))", "got"),
        ("()", r"got \(\)"),
        ("words", "got words"),
        ("(assert (>= X_0 5))(assert (>= Y_0 1))", "no input is asked for"),
        ("(assert (= Y_0 1))", "expected"),
        ("(assert (>= Y_0 1)", "not closed"),
        ("(define-fun f () Real 1)", "declare-const and assert"),
        ("(assert (>= X_5 0))(assert (>= Y_0 1))", "each of the 2 inputs .* see X_5"),
    ],
)
def test_what_a_property_cannot_say(tmp_path, text, told):
    with pytest.raises(rl.InputError, match=rf"p\.vnnlib.*{told}"):
        vnnlib.read(written(tmp_path / "p.vnnlib", text), (2,), 2)


def test_a_file_that_is_no_property(tmp_path):
    (tmp_path / "p.vnnlib").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(rl.InputError, match=r"p\.vnnlib is no text: unpack it"):
        vnnlib.read(tmp_path / "p.vnnlib", (2,), 2)
    with pytest.raises(rl.InputError, match="two bounds, and no other; see X_2"):
        vnnlib.read(written(tmp_path / "p.vnnlib", "(assert (>= Y_0 1))"), (3,), 2)


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


def written_as(node, weights=None, shape=(2, 4, 4), opset=15):
    """A network of one operator from x to y."""
    graph = helper.make_graph(
        [*node] if isinstance(node, list) else [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def made(kind, *inputs, **options):
    return helper.make_node(kind, ["x", *inputs], ["y"], **options)


RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(2, 2, 2)).astype(np.float32)
FILTER = RANDOM.normal(size=(3, 1, 2, 2)).astype(np.float32)
SQUARE = RANDOM.normal(size=(4, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("node", "weights", "shape"),
    [
        (made("AveragePool", kernel_shape=[2, 2], pads=[1, 1, 1, 1]), None, (2, 4, 4)),
        (made("AveragePool", kernel_shape=[2, 2], count_include_pad=1, pads=[1] * 4), None, None),
        (made("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), None, None),
        (made("GlobalAveragePool"), None, (2, 5)),
        (made("GlobalAveragePool"), None, None),
        (made("GlobalAveragePool"), None, (2, 2, 3, 2)),
        (made("Conv", "k", pads=[1, 0]), {"k": KERNEL}, (2, 5)),
        (made("Conv", "k", group=2, strides=[2, 1]), {"k": FILTER.repeat(2, 0)}, None),
        (made("Conv", "k"), {"k": FILTER[:, :, None]}, (1, 2, 3, 3)),
        (made("Squeeze", "a"), {"a": np.array([2])}, (2, 1, 1)),
        (made("Transpose", perm=[0, 2, 1, 3]), None, None),
        (made("Reshape", "s"), {"s": np.array([-1, 8, 4])}, None),
        (made("Reshape", "s"), {"s": np.array([0, -1])}, None),
        (helper.make_node("MatMul", ["w", "x"], ["y"]), {"w": SQUARE}, None),
        (made("BatchNormalization", *"wwww"), {"w": np.ones(2, np.float32)}, None),
        ([helper.make_node("Constant", [], ["c"], value_float=0.3), made("Mul", "c")], None, None),
        (
            [helper.make_node("Transpose", ["w"], ["t"]), made("MatMul", "t")],
            {"w": SQUARE},
            None,
        ),
        (
            [helper.make_node("Reshape", ["w", "s"], ["t"]), made("Add", "t")],
            {"w": SQUARE.repeat(2, 0), "s": np.array([1, 2, 4, 4])},
            None,
        ),
    ],
)
def test_operators_are_those_of_the_standard(node, weights, shape):
    from onnx.reference import ReferenceEvaluator

    shape = shape or (2, 4, 4)
    model, x = written_as(node, weights, shape), torch.rand(1, *shape)
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    found = reader.OnnxNetwork(model)(x)
    np.testing.assert_allclose(found[0], np.asarray(expected).ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "weights", "shape", "told"),
    [
        (made("MaxPool", kernel_shape=[2], strides=[2]), None, (2, 4), "MaxPool of 3 dim"),
        (made("AveragePool", kernel_shape=[2]), None, (2, 4), "AveragePool of 3 dim"),
        (made("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]), None, None, "dilations"),
        (made("MaxPool", kernel_shape=[2, 2], ceil_mode=1), None, None, "ceil_mode"),
        (made("Conv", "k", auto_pad="SAME_UPPER"), {"k": FILTER}, (1, 4, 4), "auto_pad"),
        (made("Flatten", axis=2), None, None, "axis"),
        (made("Squeeze", "a"), {"a": np.array([0])}, (2, 4), "axes"),
        (made("Squeeze"), None, (1, 4), "axes"),
        (made("Transpose"), None, None, "moves the batch"),
        (made("Reshape", "s"), {"s": np.array([2, 16])}, None, "apart"),
        (made("Add", "w"), {"w": np.ones((3, 4), np.float32)}, (4,), "batch is lost"),
        (made("Gemm", "w", transA=1), {"w": SQUARE}, (4,), "transA"),
        (helper.make_node("Gemm", ["w", "x"], ["y"]), {"w": SQUARE}, (4,), "depend on the input"),
        (made("BatchNormalization", *"wwww", training_mode=1), {"w": np.ones(2)}, None, "training"),
        (made("Relu", domain="com.example"), None, None, "com.example.Relu"),
        (made("Relu", surprise=1), None, None, "surprise"),
        (helper.make_node("Add", ["x", "z"], ["y"]), None, None, "'z'"),
    ],
)
def test_what_an_operator_cannot_be_given_is_named(node, weights, shape, told):
    shape = shape or (2, 4, 4)
    with pytest.raises(rl.InputError, match=told):
        reader.OnnxNetwork(written_as(node, weights, shape))(torch.rand(1, *shape))


def test_old_files_and_batches_are_refused():
    with pytest.raises(rl.InputError, match="opset 6"):
        reader.OnnxNetwork(written_as(made("Relu"), opset=6))
    model = written_as(made("Relu"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    with pytest.raises(rl.InputError, match="batch of one"):
        reader.OnnxNetwork(model)


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
