"""Shared fixtures: threads, third-party data, and a check that nothing global was touched."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The networks are so small that a second thread only waits: on busy cores for long."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder():
    """Third-party data: the folder in ROBUSTLEARN_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ROBUSTLEARN_DATA", beside))
    if not (folder / "models").is_dir():
        pytest.skip("third-party data not found: point ROBUSTLEARN_DATA at it")
    return folder


@pytest.fixture
def untouched():
    """Fail if a test changed a global random state."""

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return (
            random.getstate(),
            numpy_state[1].tobytes(),
            numpy_state[2:],
            torch.get_rng_state().numpy().tobytes(),
        )

    before = states()
    yield
    assert states() == before
