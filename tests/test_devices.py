"""On a device that computes but does not mix with the CPU, all comes out as on the CPU."""

import subprocess
import sys

import device_work
import pytest
import torch

ROUNDED = tuple(  # their gradients are summed in another order there
    f"{kind} {name}" for kind in ("objective", "fit") for name in ("grad_align", "crown_ibp")
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What all pieces of work give on the CPU and there; the stand-in stays in its process."""
    path = tmp_path_factory.mktemp("devices") / "found"
    command = [sys.executable, device_work.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", device_work.works())
def test_another_device_gives_what_the_cpu_gives(found, name):
    plain, there = found["cpu"][name], found["there"][name]
    assert "error" not in plain, plain["error"]
    assert "error" not in there, there["error"]
    assert plain.keys() == there.keys()
    for key, value in plain.items():
        if name in ROUNDED and isinstance(value, torch.Tensor):
            torch.testing.assert_close(there[key], value, rtol=1e-4, atol=1e-6)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(there[key], value), key
        elif name not in ROUNDED:
            assert there[key] == value, key
