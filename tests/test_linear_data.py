"""Where the samples lie does not matter: memory, a file, a sparse matrix, torch, dask workers."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from robustlearn.errors import InputError
from robustlearn.linear import AdversarialClassifier, AdversarialRegressor, _design

MOST = 350 * 2**20  # bytes above those before the fit
TIGHT = {"eps": 0.1, "relative": True, "tol": 1e-9}


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 12)) + np.linspace(-3, 3, 12)
    return x, x @ rng.standard_normal(12) + rng.standard_normal(3000)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_design, "BLOCK", 12 * 700)  # the last block is smaller


@pytest.mark.parametrize("norm", [1, 2, np.inf])
@pytest.mark.parametrize("loss", ["squared", "huber"])
@pytest.mark.parametrize("kind", ["file", "csr", "torch"])
def test_the_same_model_wherever_the_samples_lie(samples, tmp_path, kind, loss, norm):
    x, y = samples
    options = {**TIGHT, "loss": loss, "norm": norm}
    expected = AdversarialRegressor(**options).fit(x, y)
    there = {"file": lambda: _file(x, tmp_path), "csr": lambda: scipy.sparse.csr_matrix(x)}
    data = there[kind]() if kind in there else torch.as_tensor(x)
    model = AdversarialRegressor(**options).fit(data, torch.as_tensor(y) if kind == "torch" else y)
    close = 1e-8 if loss == "squared" else 1e-6  # Newton's method ends on the minimum itself
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=close)
    assert model.intercept_ == pytest.approx(expected.intercept_, abs=close)
    assert model.dual_gap_ <= 1e-9 * model.objective_
    np.testing.assert_allclose(model.predict(data), expected.predict(x), rtol=0, atol=20 * close)


def _file(x, folder):
    stored = np.memmap(folder / "x.dat", dtype=np.float64, mode="w+", shape=x.shape)
    stored[:] = x
    stored.flush()
    return np.memmap(folder / "x.dat", dtype=np.float64, mode="r", shape=x.shape)


def test_blocks_of_a_file_leave_memory(samples, tmp_path):
    stored = _file(samples[0], tmp_path)
    block = _design._rows(stored, slice(10, 20))
    assert block.base is not stored.base
    np.testing.assert_array_equal(block, samples[0][10:20])
    assert not _design.is_mapped(stored[5:])  # whose offset numpy does not keep


def test_two_workers_of_dask_give_the_same_model(samples):
    distributed = pytest.importorskip("distributed")
    array = pytest.importorskip("dask.array")
    x, y = samples
    expected = AdversarialRegressor(**TIGHT).fit(x, y)
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster):
        blocks = array.from_array(x, chunks=(800, 5))
        model = AdversarialRegressor(**TIGHT).fit(blocks, array.from_array(y, chunks=800))
        np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.predict(blocks), expected.predict(x), rtol=0, atol=1e-7)


def test_a_classifier_of_tensors(samples):
    x, y = samples
    labels = (y > np.median(y)).astype(int)
    expected = AdversarialClassifier(0.1, norm=np.inf).fit(x, labels)
    model = AdversarialClassifier(0.1, norm=np.inf).fit(torch.as_tensor(x), torch.as_tensor(labels))
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(model.predict(torch.as_tensor(x)), expected.predict(x))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.full((4, 2), torch.nan), torch.zeros(4), "NaN or infinity"),
        (torch.zeros(4), torch.zeros(4), "1 dimensions"),
        (torch.zeros(4, 2), torch.zeros(3), "4 samples, y has shape"),
        (torch.zeros(4, 2), torch.full((4,), torch.inf), "y holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x, y, message):
    with pytest.raises(InputError, match=message):
        AdversarialRegressor().fit(x, y)


@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_what_is_written_to_a_copy_of_a_file_counts(samples, tmp_path, loss):
    x, y = samples
    _file(0 * x, tmp_path)
    private = np.memmap(tmp_path / "x.dat", dtype=np.float64, mode="c", shape=x.shape)
    private[:] = x
    expected = AdversarialRegressor(**TIGHT, loss=loss).fit(x, y)
    model = AdversarialRegressor(**TIGHT, loss=loss).fit(private, y)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=1e-8)


def test_a_file_without_a_name(samples):
    x, y = samples
    with tempfile.TemporaryFile() as file:
        stored = np.memmap(file, dtype=np.float64, mode="w+", shape=x.shape)
        stored[:] = x
        model = AdversarialRegressor(**TIGHT).fit(stored, y)
    expected = AdversarialRegressor(**TIGHT).fit(x, y)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss", ["squared", "huber"])
@pytest.mark.parametrize("kind", ["file", "torch", "csr"])
def test_rows_without_weight_count_nowhere(samples, tmp_path, kind, loss):
    x, y = samples
    weight = np.random.default_rng(1).integers(0, 3, len(y)).astype(float)
    weight[200:2000] = 0  # whole blocks
    there = {"file": lambda: _file(x, tmp_path), "csr": lambda: scipy.sparse.csr_matrix(x)}
    data = there[kind]() if kind in there else torch.as_tensor(x)
    kept = weight > 0
    expected = AdversarialRegressor(**TIGHT, loss=loss).fit(x[kept], y[kept], weight[kept])
    model = AdversarialRegressor(**TIGHT, loss=loss).fit(data, y, weight)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=1e-6)
    design = _design.Design(data, intercept=True, kept=kept)
    if kind == "file":
        assert design.x is data  # no copy
    np.testing.assert_array_equal(
        design.take(np.array([3, 700]))[:, :-1], x[kept][[3, 700]] - design.shift
    )
    np.testing.assert_allclose(design.pick(np.array([12, 2]))[:, 0], 1)
    np.testing.assert_allclose(design.pick(np.array([12, 2]))[:, 1], x[kept, 2] - design.shift[2])


def test_all_rows_of_an_array_are_no_copy(samples):
    x = samples[0]
    assert np.shares_memory(_design.Design(x, intercept=False).take(), x)
    for design in (
        _design.Design(x, intercept=True),
        _design.Design(np.asfortranarray(x), intercept=False),
        _design.Design(x.astype(np.float32), intercept=False),
    ):
        assert not np.shares_memory(design.take(), x)


@pytest.mark.parametrize("kind", ["regressor", "classifier"])
def test_dask_arrays_with_other_losses(samples, kind):
    array = pytest.importorskip("dask.array")
    x, y = samples
    if kind == "regressor":
        make = partial(AdversarialRegressor, **TIGHT, loss="huber")
    else:
        make, y = partial(AdversarialClassifier, 0.1), (y > np.median(y)).astype(int)
    expected = make().fit(x, y)
    weight = np.ones(len(y))
    weight[:5] = 0
    blocks = array.from_array(x, chunks=(800, 5))
    model = make().fit(blocks, array.from_array(y, chunks=800))
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=0, atol=1e-6)
    assert model.dual_gap_ <= 1e-8 * model.objective_
    fewer = make().fit(blocks, y, weight)
    np.testing.assert_allclose(fewer.coef_, make().fit(x[5:], y[5:]).coef_, rtol=0, atol=1e-6)


def test_names_of_features_do_not_outlive_a_fit_without(samples):
    x, y = samples
    model = AdversarialRegressor().fit(pd.DataFrame(x, columns=list("abcdefghijkl")), y)
    assert hasattr(model, "feature_names_in_")
    model.fit(torch.as_tensor(x), y)
    assert not hasattr(model, "feature_names_in_")


RESIDENT = """
import resource, sys
import numpy as np
from robustlearn.linear import AdversarialRegressor
n, d = 2_000_000, 20
x = np.memmap(sys.argv[1], dtype=np.float64, mode="w+", shape=(n, d))
y = np.empty(n)
rng, w = np.random.default_rng(0), np.linspace(-1, 1, d)
for start in range(0, n, 100_000):
    part = rng.standard_normal((100_000, d))
    x[start : start + 100_000] = part
    y[start : start + 100_000] = part @ w + rng.standard_normal(100_000)
x.flush()
del x
import os
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
stored = np.memmap(sys.argv[1], dtype=np.float64, mode="r", shape=(n, d))
weight = np.ones(n)
weight[0] = float(sys.argv[2])
model = AdversarialRegressor(0.1, relative=True).fit(stored, y, weight)
assert model.dual_gap_ <= 1e-8 * model.objective_
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(int(peak.split()[1]) * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["1", "0"])
def test_a_file_is_fitted_without_a_copy(tmp_path, first):
    """X has 305 MiB; some numbers a row, a block, and rows of small residual are held."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc of Linux")
    run = [sys.executable, "-c", RESIDENT, str(tmp_path / "x.dat"), first]
    told = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(told.stdout) < MOST, f"{int(told.stdout) / 2**20:.0f} MiB"
