"""Data sets to evaluate on: built in, or from a file, checked on the way in."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustlearn.errors import InputError

BUILT_IN = ("breast_cancer", "diabetes", "digits", "iris", "wine")
KEYS = (("x", "y"), ("X", "y"))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples x (n, *shape) as floats with labels or targets y (n,), and what they are called."""

    name: str
    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Any) -> "Dataset":
        """Return some of the samples."""
        return Dataset(
            self.name, self.x[index], self.y[index], self.feature_names, self.class_names
        )


def load(source: str | Path, *, target: str | None = None, part: str = "test") -> Dataset:
    """Load a built-in data set by name, an ``.npz`` file, or a ``.csv`` table.

    Parameters
    ----------
    source : ``digits`` (1,797 images (1, 8, 8) in [0, 1]), ``breast_cancer``, ``wine``, ``iris``,
        ``diabetes`` (regression), or a path. An ``.npz`` holds arrays ``x`` and ``y`` (or ``X``
        and ``y``, or ``x_test`` and ``y_test``); it is never unpickled.
    part : ``"test"`` or ``"train"``, of a file that holds both.
    target : name of the target column of a ``.csv``.

    Raises
    ------
    InputError for a missing or unreadable file, a missing column, text where numbers are needed,
    or what `check` finds.

    Examples
    --------
    >>> load("iris").x.shape
    (150, 4)
    """
    if str(source) in BUILT_IN:
        return _built_in(str(source))
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"there is no data file {str(source)!r}, and no built-in set of that name "
            f"({', '.join(BUILT_IN)})"
        )
    suffix = "".join(path.suffixes[-2:]).lower()
    if suffix.endswith(".npz"):
        dataset = _from_npz(path, part)
    elif suffix.endswith((".csv", ".csv.gz")):
        dataset = _from_csv(path, target)
    else:
        raise InputError(f"{path.name}: expected a .npz, .csv or .csv.gz file")
    check(dataset.x, dataset.y)
    return dataset


def check(x: np.ndarray, y: np.ndarray) -> None:
    """Raise an InputError unless x and y are as many, not empty, and free of NaN and infinity."""
    if x.ndim == 0 or len(x) == 0 or x.size == 0:
        raise InputError(f"the data set is empty: x has shape {x.shape}")
    if y.ndim == 2 and y.shape[0] == len(x) and y.shape[1] > 1:
        raise InputError(
            f"y has shape {y.shape}: give one label a sample, as in y.argmax(axis=1) for one-hot "
            "labels"
        )
    if y.size != len(x):
        raise InputError(f"x has {len(x)} samples, but y has shape {y.shape}")
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
            raise InputError(
                f"{name} holds NaN or infinity in {len(rows)} of {len(array)} samples (first: "
                f"{rows[:5].tolist()}); drop or impute them"
            )


def _built_in(name: str) -> Dataset:
    from sklearn import datasets

    if name == "diabetes":
        bunch = datasets.load_diabetes()
        return Dataset(name, bunch.data, bunch.target, tuple(bunch.feature_names))
    bunch = getattr(datasets, f"load_{name}")()
    classes = tuple(str(c) for c in bunch.target_names)
    if name == "digits":
        return Dataset(name, bunch.images[:, None] / 16.0, bunch.target, None, classes)
    return Dataset(name, bunch.data, bunch.target, tuple(map(str, bunch.feature_names)), classes)


def _from_npz(path: Path, part: str) -> Dataset:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            keys = (*KEYS, *((f"{x}_{part}", f"{y}_{part}") for x, y in KEYS))
            pair = next((pair for pair in keys if set(pair) <= set(file.files)), None)
            if pair is None:
                raise InputError(
                    f"{path.name} holds {', '.join(file.files) or 'nothing'}; expected arrays x "
                    f"and y (or X and y, or x_{part} and y_{part})"
                )
            x, y = file[pair[0]], file[pair[1]]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path.name} cannot be read as plain arrays ({error}); object arrays are pickles, "
            "which run code when loaded: save numbers with numpy.savez(path, x=…, y=…)"
        ) from error
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path.name} is not a readable .npz file: {error}") from error
    return Dataset(path.stem, x, y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y)


def features(source: str | Path, *, drop: str | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Load rows without labels: (n, d) and the names of the columns.

    Parameters
    ----------
    source : FILE.csv or FILE.csv.gz, every column a feature; or FILE.npz with an array x (or X).
    drop : column of a table to leave out, such as a label.

    Raises
    ------
    InputError for a file that is not there or not readable, text, and a column that is not there.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"there is no data file {str(source)!r}")
    if path.suffix.lower() == ".npz":
        if drop is not None:
            raise InputError(f"{path.name} has no named columns: there is no {drop!r} to leave out")
        x = _rows_of_npz(path)
        return x, tuple(f"feature {j}" for j in range(x.shape[1]))
    table = _table(path)
    if not len(table):
        raise InputError(f"{path.name} has a header and no rows; give at least one row of numbers")
    if drop is not None:
        table = _without(table, drop, path)
    return _numbers(table, path), tuple(str(c) for c in table.columns)


def _rows_of_npz(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            name = next((name for name in ("x", "X") if name in file.files), None)
            if name is None:
                held = ", ".join(file.files) or "nothing"
                raise InputError(f"{path.name} holds {held}; expected an array x (or X)")
            x = file[name]
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path.name} is not a readable .npz file of numbers: {error}") from error
    if not x.ndim or not x.size or x.dtype.kind not in "biuf":
        raise InputError(
            f"{path.name} holds {name} of {x.dtype} {x.shape}; numbers (n, d) were expected"
        )
    return x.reshape(len(x), -1)


def _table(path: Path) -> Any:
    import pandas

    try:
        table = pandas.read_csv(path)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is not a readable table: {error}") from error
    if _are_numbers(names := [str(c) for c in table.columns]):
        raise InputError(
            f"the first line of {path.name} holds numbers, {', '.join(names[:4])}: it would be "
            "read as the names of the columns; put a line of names before it"
        )
    return table


def _are_numbers(names: list[str]) -> bool:
    """Tell a row of numbers from names, among which 0, 1, 2, … are: pandas writes those."""
    if all(name.isdecimal() for name in names):
        places = [int(name) for name in names]
        return places != sorted(set(places))
    try:
        return bool([float(name) for name in names])
    except ValueError:
        return False


def _without(table: Any, column: str, path: Path) -> Any:
    if column not in map(str, table.columns):
        known = ", ".join(map(str, table.columns))
        raise InputError(f"{path.name} has no column {column!r}; it has {known}")
    return table.drop(columns=column)


def _numbers(table: Any, path: Path) -> np.ndarray:
    text = [str(c) for c in table.columns if table[c].dtype.kind not in "biuf"]
    if text:
        raise InputError(
            f"{path.name}: the columns {', '.join(text)} hold text; encode them as numbers first"
        )
    return np.asarray(table.to_numpy(dtype=float))


def _from_csv(path: Path, target: str | None) -> Dataset:
    table = _table(path)
    columns = [str(c) for c in table.columns]
    if target is None:
        raise InputError(f"name the target column of {path.name}; it has {', '.join(columns)}")
    features = _without(table, target, path)
    y = table[target].to_numpy()
    if y.dtype.kind not in "biuf":
        y = y.astype(str)
    names = tuple(c for c in columns if c != target)
    return Dataset(path.stem, _numbers(features, path), y, names)
