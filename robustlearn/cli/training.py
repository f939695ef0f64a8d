"""What `robustlearn train` does beside `robustlearn.fit`: its network, data and loss."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from robustlearn.data import Dataset, load
from robustlearn.errors import InputError
from robustlearn.loop import Samples
from robustlearn.models import Model, TorchModel
from robustlearn.train import Criterion, TrainingResult

Pair = tuple[np.ndarray, np.ndarray]


def network(model: Model) -> nn.Module:
    """Return the torch module that can be trained."""
    if not isinstance(model, TorchModel) or not isinstance(model.source, nn.Module):
        raise InputError(
            f"training needs a torch network, and {model.name} is none; linear models are trained "
            "by robustlearn fit-linear"
        )
    return model.source


def another(
    source: str | None, *, like: Dataset, target: str | None, part: str = "test"
) -> Pair | None:
    """Load x and y of --validation, --test or --extra, of the same features as the data."""
    if source is None or share(source) is not None:
        return None
    found = load(source, target=target, part=part)
    if found.feature_names != like.feature_names:
        raise InputError(
            f"{source} has the columns {found.feature_names}; expected those of the data, "
            f"{like.feature_names}, in their order"
        )
    return found.x, found.y


def share(text: str) -> float | None:
    """Return a share of the data; None for what is no number, and names data."""
    try:
        return float(text)
    except ValueError:
        return None


def mixed(data: Dataset, extra: Pair | None, ratio: float) -> Any:
    """Return what is trained on: the data, and --extra in each batch."""
    pair = (data.x, data.y)
    return pair if extra is None else Samples(pair, extra=extra, ratio=ratio)


def criterion(
    kind: str | None, smoothing: float, weights: str | None, y: np.ndarray
) -> Criterion | None:
    """Return the loss of --criterion, --smoothing and --class-weights.

    None for what the labels suggest. Balanced weights are n / (K nₖ) of the nₖ samples of a class.
    """
    if kind is None and smoothing == 0 and weights is None:
        return None
    if weights is None:
        return Criterion(kind or "cross_entropy", smoothing)
    if weights == "balanced":
        counts = np.bincount(np.asarray(y, dtype=np.int64))
        chosen = len(y) / (len(counts) * np.maximum(counts, 1))
    else:
        chosen = np.array([_weight(part) for part in weights.split(",")])
    return Criterion(kind or "cross_entropy", smoothing, weights=torch.from_numpy(chosen))


def _weight(text: str) -> float:
    found = share(text)
    if found is None:
        raise InputError(
            f"--class-weights is one number a class, as 1,9, or balanced; got {text!r}"
        )
    return found


def show(result: TrainingResult, out: Path) -> None:
    """Print what came of it, and where it is."""
    console = Console()
    console.print(Text(str(result)))
    console.print(Text(f"weights: {out / 'model.safetensors'}, report: {out / 'training.html'}"))
