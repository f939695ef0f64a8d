"""What the user names on the command line, as objects."""

import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import robustlearn as rl
from robustlearn import data, linear
from robustlearn.errors import InputError
from robustlearn.evaluate import Estimate
from robustlearn.evaluate.sharing import first
from robustlearn.models import Model
from robustlearn.report import plain
from robustlearn.tabular import from_table
from robustlearn.threats import LpBall, parse_norm

__all__ = ["certificate", "model", "plain", "samples", "state", "threat", "write_certificate"]


def samples(
    source: str, target: str | None, limit: int | None, seed: int, *, part: str = "test"
) -> tuple[data.Dataset, np.ndarray]:
    """Load a data set, or a random part of it, and the numbers of its samples."""
    dataset = data.load(source, target=target, part=part)
    indices = np.arange(len(dataset))
    if limit is not None and limit < len(dataset):
        indices = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit])
    return dataset.take(indices), indices


def threat(
    norm: str,
    eps: float,
    lower: float | None,
    upper: float | None,
    *,
    features: Path | None = None,
    columns: Sequence[str] | None = None,
) -> LpBall:
    """Make the threat of --norm, --eps, --lower and --upper, or of --features.

    ``columns`` are the features of the data in order; without, they are those of the table.
    """
    if features is None:
        return LpBall(parse_norm(norm), eps, lower=lower, upper=upper)
    if lower is not None or upper is not None:
        raise InputError(
            f"{features.name} bounds each feature by its own min and max: leave out --lower and "
            "--upper, or change the table"
        )
    return from_table(_feature_table(features), parse_norm(norm), eps, columns=columns)


def state(out: Path, resume: bool) -> Path:
    """Return the folder of finished batches; clear it unless the run is to go on."""
    folder = out / ".robustlearn-state"
    if not resume and first():
        for pattern in ("question.json", "clean.npz", "*/[0-9][0-9][0-9][0-9][0-9][0-9].npz"):
            for path in folder.glob(pattern):  # what State writes, and nothing else
                path.unlink()
    return folder


def model(name: str, *, task: str | None, allow_pickle: bool) -> Model:
    """Load and wrap the model that --model names."""
    place, colon, attribute = name.rpartition(":")
    if colon and place and not Path(name).exists():
        return rl.wrap(_built(_attribute(_module(place), attribute, name)), task=task)  # type: ignore[arg-type]
    path = Path(name)
    if not path.is_file():
        raise InputError(
            f"there is no model {name!r}: give FILE.py:NAME or package.module:NAME, where NAME is "
            "a model or a function that builds one"
        )
    if path.suffix == ".py":
        raise InputError(f"say which model of {path.name} you mean: {name}:NAME")
    if path.suffix == ".skops":
        return rl.wrap(_from_skops(path), task=task)  # type: ignore[arg-type]
    return rl.wrap(_unpickled(path, allow_pickle), task=task)  # type: ignore[arg-type]


def certificate(
    wrapped: Model, dataset: data.Dataset, indices: np.ndarray, threat: LpBall, method: str,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Certify the labels and return plain data: the totals, and one row a sample."""
    found = rl.certify(wrapped, dataset.x, threat, y=dataset.y, method=method, seconds=seconds)
    names = ("status", "by", "radius", "certified", "margin", "lower", "upper", "loss")
    columns = {name: value for name in names if (value := getattr(found, name)) is not None}
    rows = [
        {
            "index": int(index),
            "label": dataset.y[i].item(),
            **{name: column[i : i + 1].tolist()[0] for name, column in columns.items()},
        }
        for i, index in enumerate(indices)
    ]
    if found.certified is not None:
        total = Estimate.proportion(int(found.certified.sum()), len(rows))
    else:
        total = Estimate.mean(columns["loss"])
    return {
        "model": wrapped.name,
        "task": wrapped.task,
        "data": dataset.name,
        "threat": {**threat.describe(), "text": str(threat)},
        "method": found.method,
        "exact": found.exact,
        "alpha": found.alpha,
        "open": None if found.status is None else float((found.status == "open").mean()),
        "certified": dataclasses.asdict(total),
        "samples": rows,
    }


def write_certificate(folder: Path, result: dict[str, Any]) -> None:
    """Write certificate.json, and its rows as samples.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(result), indent=1, allow_nan=False)
    (folder / "certificate.json").write_text(text, encoding="utf-8")
    rows = result["samples"]
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _feature_table(path: Path) -> Any:
    import pandas

    try:
        return pandas.read_csv(path)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} is not a readable table: {error}") from error


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Tell an exception of the user's code with its traceback, as something the user can mend."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} failed:\n{traceback.format_exc()}") from error


def _module(place: str) -> Any:
    path = Path(place)
    if path.suffix != ".py":
        with _users_code(f"importing {place}"):
            return importlib.import_module(place)
    if not path.is_file():
        raise InputError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{place} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent.resolve()))  # so that it finds its neighbours
    with _users_code(f"loading {place}"):
        spec.loader.exec_module(module)
    return module


def _attribute(module: Any, attribute: str, name: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = ", ".join(sorted(n for n in vars(module) if not n.startswith("_"))[:12])
        raise InputError(f"{name}: there is no {attribute!r}; there are: {public}") from None


def _built(thing: Any) -> Any:
    """Return a model as it is; call a class or function that needs no arguments."""
    model = isinstance(thing, nn.Module) or hasattr(thing, "predict")
    if (model and not isinstance(thing, type)) or not callable(thing):
        return thing
    return _call(thing) if _needs_nothing(thing) else thing


def _needs_nothing(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in variable for p in parameters)


def _call(function: Callable[[], Any]) -> Any:
    with _users_code(f"{function.__name__}()"):
        return function()


_OURS = frozenset(
    f"{kind.__module__}.{kind.__qualname__}"
    for kind in (
        linear.AdversarialClassifier,
        linear.AdversarialClassifierCV,
        linear.AdversarialRegressor,
        linear.AdversarialRegressorCV,
    )
)


def _from_skops(path: Path) -> Any:
    """Load a model that holds nothing but scikit-learn's estimators and ours; no code runs."""
    import skops.io

    try:
        types = skops.io.get_untrusted_types(file=path)
        ours = [name for name in types if name in _OURS]
        if len(ours) < len(types):
            other = ", ".join(sorted(set(types) - set(ours)))
            raise InputError(
                f"{path.name} holds types that are neither scikit-learn's nor ours: {other}; load "
                "it in a module of your own and give that as --model FILE.py:NAME"
            )
        return skops.io.load(path, trusted=ours)
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path.name} is not a readable .skops file: {error}") from error


def _unpickled(path: Path, allowed: bool) -> Any:
    if not allowed:
        raise InputError(
            f"{path.name} looks like a pickled model. Unpickling runs whatever code the file "
            "contains, so it is not done unless you say --allow-pickle: do so only if you made "
            "the file yourself or trust who did. Safer: a function that builds the network and "
            "loads its weights from a .safetensors file, given as --model FILE.py:build"
        )
    warnings.warn(
        f"unpickling {path.name}: this runs the code that the file contains",
        UserWarning,
        stacklevel=2,
    )
    with _users_code(f"unpickling {path.name}"):
        loaded = _load(path)
    if isinstance(loaded, dict):
        raise InputError(
            f"{path.name} holds a dictionary (weights?), not a model: write a function that "
            "builds the model and loads them, and give it as --model FILE.py:build"
        )
    return loaded


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        import torch

        return torch.load(path, map_location="cpu", weights_only=False)
    import joblib

    return joblib.load(path)
