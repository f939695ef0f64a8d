"""Loading and checking data."""

import numpy as np
import pytest

from robustlearn import data
from robustlearn.errors import InputError


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_built_in_sets(name):
    dataset = data.load(name)
    data.check(dataset.x, dataset.y)
    assert dataset.x.dtype == float
    assert len(dataset.take(slice(0, 7))) == 7
    if name == "digits":
        assert dataset.x.shape == (1797, 1, 8, 8)
        assert (dataset.x.min(), dataset.x.max()) == (0, 1)
    else:
        assert len(dataset.feature_names) == dataset.x.shape[1]


@pytest.mark.parametrize("keys", data.KEYS)
def test_npz(tmp_path, keys):
    x, y = np.random.default_rng(0).random((5, 2, 3)), np.arange(5)
    np.savez(tmp_path / "d.npz", **dict(zip(keys, (x, y[:, None]), strict=True)))
    dataset = data.load(tmp_path / "d.npz")
    np.testing.assert_array_equal(dataset.x, x)
    np.testing.assert_array_equal(dataset.y, y)
    assert dataset.name == "d"


def test_csv(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,kind\n1,2.5,cat\n3,4,dog\n")
    dataset = data.load(tmp_path / "t.csv", target="kind")
    assert dataset.feature_names == ("a", "b")
    assert dataset.y.tolist() == ["cat", "dog"]
    np.testing.assert_array_equal(dataset.x, [[1, 2.5], [3, 4]])


def write(folder, name, content):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "target", "message"),
    [
        ("d.npz", {"images": np.ones(2)}, None, "holds images; expected arrays x and y"),
        ("d.npz", {"x": np.array([{}]), "y": np.ones(1)}, None, "object arrays are pickles"),
        ("d.npz", b"PK\x03\x04 broken", None, "not a readable .npz file"),
        ("d.npz", b"\x80\x04K\x01.", None, "pickles"),
        ("d.npz", {"x": np.ones((0, 3)), "y": np.ones(0)}, None, "the data set is empty"),
        ("d.npz", {"x": np.ones((2, 3)), "y": np.ones(3)}, None, "x has 2 samples, but y"),
        ("d.npz", {"x": np.ones((2, 3)), "y": np.eye(2)}, None, r"y.argmax\(axis=1\)"),
        ("d.npz", {"x": np.full((2, 3), np.nan), "y": np.ones(2)}, None, "x holds NaN"),
        ("t.csv", "a,b\n1,2\n", None, "name the target column of t.csv; it has a, b"),
        ("t.csv", "a,b\n1,2\n", "c", "no column 'c'; it has a, b"),
        ("t.csv", "a,b\nred,2\n", "b", "the columns a hold text"),
        ("t.csv", "", "b", "not a readable table"),
        ("t.txt", "a", None, r"expected a .npz, .csv or .csv.gz"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, name, content, target, message):
    with pytest.raises(InputError, match=message):
        data.load(write(tmp_path, name, content), target=target)


def test_a_missing_file_names_the_built_in_sets():
    with pytest.raises(InputError, match=r"no data file 'mnist'.*digits"):
        data.load("mnist")
