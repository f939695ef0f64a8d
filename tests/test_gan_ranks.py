"""Two processes that share each batch of a GAN end with the weights of one."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from robustlearn.gan import fit_gan
from robustlearn.gan.mixtures import perceptron, ring

CASES = {"alternating": "relativistic_paired", "extragradient": "began:rate=0.1"}


def trained(order):
    """Train with second derivatives in the penalties, and with a loss that adapts itself."""
    torch.manual_seed(0)
    outputs = 2 if "began" in CASES[order] else 1
    pair = perceptron(2, 2, width=16), perceptron(2, outputs, width=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit_gan(
            *pair,
            ring().sample(70),
            noise=2,
            loss=CASES[order],
            penalty="r1:weight=0.1 + gradient_penalty:weight=0.1",
            order=order,
            optimizer="sgd",
            lr=1e-2,
            epochs=2,
            batch_size=32,
            compare=50,
            timeout=60.0,
        )
    return result.history.weights, result.game.loss.state


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    from test_loop_ranks import free_port

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), __file__, str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for order, (weights, state) in torch.load(tmp_path / "found").items():
        expected, balance = trained(order)
        assert state == pytest.approx(balance, rel=1e-5)
        for name, side in expected.items():
            for key, value in side.items():
                torch.testing.assert_close(weights[name][key], value, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {order: trained(order) for order in CASES}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
