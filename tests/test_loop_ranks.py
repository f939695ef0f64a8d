"""Training in several processes gives what one process gives, and a dead one ends the others."""

import socket
import subprocess
import sys
import time

import games
import pytest
import torch
from games import Noisy, plain, train
from safetensors.torch import load_file

from robustlearn.loop import Samples


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def launch(world, *arguments, script=games.__file__, seconds=120):
    """Start a script, by default one of games.py, in several processes by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-port", str(free_port()), script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What each process found, and the folder of the run that was stopped and resumed."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(request.param, "ranks", folder)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    return [torch.load(folder / f"rank{rank}") for rank in range(request.param)], folder / "run"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What each of two processes found that hold a part of each weight."""
    folder = tmp_path_factory.mktemp("parts")
    done = launch(2, "parts", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def check_equal_to_one(parts, case):
    history, expected = train(game=Noisy(), **games.CASES[case])
    for part in parts:
        for name, value in expected.items():
            torch.testing.assert_close(part["weights"][name], value, rtol=1e-4, atol=1e-5)
            kept = history.weights["model"][name]  # of the running mean
            torch.testing.assert_close(part["kept"][name], kept, rtol=1e-4, atol=1e-5)
        assert part["rows"] == parts[0]["rows"]
        assert (part["best"], part["stopped"]) == (history.best, history.stopped)
    for row, one in zip(parts[0]["rows"], plain(history), strict=True):
        assert row["metrics"] == pytest.approx(one["metrics"], rel=1e-4)


@pytest.mark.parametrize("case", games.CASES)
def test_processes_give_the_weights_of_one(found, case):
    """37 samples in batches of up to 8 are 8 + 8 + 7 + 7 + 7, in unequal parts."""
    check_equal_to_one([part[case] for part in found[0]], case)


@pytest.mark.parametrize("case", games.CASES)
def test_weights_held_in_parts_are_those_of_one_process(parts, case):
    check_equal_to_one([part[case] for part in parts], case)


def test_weights_held_in_parts_are_attacked_and_resumed(parts):
    expected = {"robust": games.robust(), "fitted": games.fitted()}
    for part in parts:
        for work, weights in expected.items():
            for name, value in weights.items():
                torch.testing.assert_close(part[work][name], value, rtol=1e-4, atol=1e-5)
        for name, value in part["whole"].items():
            assert torch.equal(part["resumed"][name], value), name
            assert torch.equal(parts[0]["whole"][name], value), name
        assert "without awp" in part["awp"]
    numbers = sum(p.numel() for p in games.network(norm=True).parameters())
    assert sum(part["held"] for part in parts) == numbers
    assert max(part["held"] for part in parts) < 0.6 * numbers


def test_two_sides_in_processes_are_those_of_one(found):
    expected = games.duel()
    for part in found[0]:
        for name, value in expected.items():
            torch.testing.assert_close(part["duel"][name], value, rtol=1e-4, atol=1e-5)


def test_perturbed_weights_in_processes_are_those_of_one(found):
    """The adversary climbs the mean over the samples of all processes."""
    expected = games.robust(awp=0.3)
    for part in found[0]:
        for name, value in expected.items():
            torch.testing.assert_close(part["perturbed"][name], value, rtol=1e-4, atol=1e-5)


def test_a_run_of_processes_that_is_resumed_ends_with_equal_weights(found):
    """With batch norm, whose statistics are those of each part, dropout, average and memory."""
    parts, folder = found
    for part in parts:
        for name, value in parts[0]["whole"].items():
            assert torch.equal(part["whole"][name], value), name
            assert torch.equal(part["resumed"][name], value), name
        assert part["resumed rows"] == parts[0]["whole rows"]
    assert len(list(folder.iterdir())) == 3  # only the first process wrote


def test_one_that_fails_ends_the_others_with_its_error(tmp_path):
    start = time.monotonic()
    done = launch(2, "failing", tmp_path)
    assert done.returncode != 0
    assert "rank 1 is no more" in done.stderr
    assert time.monotonic() - start < 60
    for rank in range(2):
        said = (tmp_path / f"rank{rank}").read_text()
        assert "hold different gradients of 'model'" in said
    check_blamed(tmp_path)


def check_blamed(folder):
    """Both processes name the step, and keep their parts of the one batch with the bad sample."""
    batches = Samples(games.samples()).batches(0, 0, 8)
    step, batch = next((k, b.tolist()) for k, b in enumerate(batches) if 5 in b)
    kept = []
    for rank in range(2):
        assert f"not finite at step {step} (" in (folder / f"spoiled{rank}").read_text()
        kept += load_file(folder / "spoiled" / f"nonfinite-{rank}.safetensors")["index"].tolist()
    assert sorted(kept) == sorted(batch)
