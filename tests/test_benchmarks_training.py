"""What the benchmark of training counts, and whom it gives which seconds."""

import importlib
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_gradients_are_counted_outside_of_the_objectives(script):
    training = script("training")
    task = training.digits(False)
    known = {"standard": 1, "fgsm": 2, "n_fgsm": 2, "free": 4, training.DEFAULT: 2}
    known |= {"pgd_at:steps=7": 8, "trades:steps=1:step_size=0.5": 3}
    for objective, gradients in known.items():
        assert training.gradients_a_sample(task, objective) == gradients, objective


def test_a_peer_gets_its_seconds_and_the_ramp(script):
    peers = script("training_peers")
    task, seen = script("training").digits(False), []

    def make(net, optimizer):
        def step(x, y, eps):
            seen.append((eps, optimizer.param_groups[0]["lr"]))
            while time.process_time() - start < 0.002 * len(seen):
                pass

        return step

    start = time.process_time()
    _, row = peers.timed(task, make, 0.2, 4e-3, 0)
    assert 0.2 <= row["cpu_seconds"] < 0.4
    budgets, rates = zip(*seen, strict=True)
    assert list(budgets) == sorted(budgets)
    assert budgets[0] < 0.1 * budgets[-1] == pytest.approx(0.015)
    assert max(rates) == pytest.approx(4e-3, rel=0.1)
    assert rates[-1] < 0.1 * 4e-3
