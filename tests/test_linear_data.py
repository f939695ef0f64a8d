"""Where the samples lie does not matter: memory, a file, a sparse matrix, torch, dask workers."""

import numpy as np
import pytest
import scipy.sparse
import torch

from robustlearn.errors import InputError
from robustlearn.linear import AdversarialClassifier, AdversarialRegressor, _design

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
