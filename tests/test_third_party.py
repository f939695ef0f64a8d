"""Networks trained by others, on real data. Skipped where the data is absent."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

import robustlearn as rl

pytestmark = pytest.mark.data

CLEAN = {  # measured on all 10,000 test images by whoever collected them
    "rsl18a_mnist_mlp_eps0.1": 95.82,
    "wong2018_mnist_eps0.1": 98.20,
    "wong2018_fashion_eps0.1": 78.27,
    "sdp_mnist_cnn_a_adv": 96.33,
    "eran_mnist_6_100": 96.29,
    "sdp_cifar_cnn_a_adv": 67.20,
    "vnncomp21_resnet2b": 69.25,
    "cifar_resnet20": 91.73,
}


@pytest.fixture(scope="session")
def zoo(data_folder):
    spec = importlib.util.spec_from_file_location("zoo", data_folder / "models" / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(folder, name, n=None):
    if name == "cifar10":
        with np.load(folder / "images" / "cifar10_test.npz") as file:
            x, y = file["x"][:n].transpose(0, 3, 1, 2), file["y"][:n]
    else:
        with np.load(folder / "images" / f"{name}.npz") as file:
            x, y = file["x_test"][:n, None], file["y_test"][:n]
    return torch.as_tensor(x / np.float32(255)), torch.as_tensor(y.astype(np.int64))


@pytest.mark.parametrize("name", CLEAN)
def test_clean_accuracy_is_as_stated(zoo, data_folder, name):
    x, y = images(data_folder, zoo.MODELS[name][0])
    model = rl.wrap(zoo.load(name))
    right = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    assert 100 * right / len(x) == pytest.approx(CLEAN[name], abs=0.011)


def test_wong2018_is_attacked_at_least_as_well_as_by_its_authors(zoo, data_folder):
    """L∞ 0.1 on MNIST: 4.1% error under PGD, 5.8% certified error (repository README)."""
    x, y = images(data_folder, "mnist")
    threat = rl.LpBall(math.inf, 0.1, lower=0.0, upper=1.0)
    net = zoo.load("wong2018_mnist_eps0.1")
    first = ["fgsm", ("pgd", {"steps": 20})]
    report = rl.evaluate(net, x, y, threat, attacks=first, batch_size=500, certify="none")
    standing = [s for s in report.samples if s.clean_correct and s.broken_by is None]
    nearest = sorted(standing, key=lambda s: s.attacked_margin)[:300]  # the rest is far off
    rows = torch.tensor([s.index for s in nearest])
    second = [("pgd", {"steps": 40, "restarts": 4})]
    more = rl.evaluate(net, x[rows], y[rows], threat, attacks=second, certify="none")
    broken = len(rows) * (1 - more.attacked.value)
    error = 1 - report.attacked.value + broken / len(x)
    assert 0.041 <= error <= 0.058


def test_what_verifiers_prove_is_never_broken(zoo, data_folder):
    """VNN-COMP 2021, resnet_2b: 37 images on which many verifiers agree that none can be broken."""
    listed = json.loads((data_folder / "verification" / "vnncomp2021.json").read_text())
    proven = [r for r in listed if r["net"] == "resnet_2b.onnx" and r["verdict"] == "unsat"]
    assert len(proven) == 37
    x, y = images(data_folder, "cifar10")
    rows = torch.tensor([r["index"] for r in proven])
    assert y[rows].tolist() == [r["label"] for r in proven]
    threat = rl.LpBall(math.inf, [r["eps"] for r in proven], lower=0.0, upper=1.0)
    report = rl.evaluate(
        zoo.load("vnncomp21_resnet2b"),
        x[rows],
        y[rows],
        threat,
        attacks=["fgsm", ("pgd", {"steps": 40, "restarts": 10}), ("square", {"queries": 200})],
    )
    assert report.clean.value == report.attacked.value == 1
    # and the same attacks do break others of the 10,000
    some = rl.evaluate(
        zoo.load("vnncomp21_resnet2b"),
        x[:100],
        y[:100],
        rl.LpBall(math.inf, 2 / 255, lower=0.0, upper=1.0),
        attacks=["pgd"],
    )
    assert some.attacked.value < some.clean.value - 0.05
