"""What `robustlearn train` does beside `robustlearn.fit`: its network, data and loss."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from robustlearn.data import Dataset, load
from robustlearn.errors import InputError
from robustlearn.loop import Samples
from robustlearn.models import Model, TorchModel, labels
from robustlearn.train import Criterion, TrainingResult
from robustlearn.train.givens import judged

EXTRA_SHARE = 0.3
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


def mixed(data: Dataset, extra: Pair | None, ratio: float | None) -> Any:
    """Return what is trained on: the data, and --extra in each batch."""
    pair = (data.x, data.y)
    if extra is not None:
        return Samples(pair, extra=extra, ratio=EXTRA_SHARE if ratio is None else ratio)
    if ratio is not None:
        raise InputError("--extra-share is the share of --extra in a batch: say which data that is")
    return pair


def memory(kept: bool | None, file: Path | None) -> bool | Path | None:
    """Return where perturbations are kept, by --memory, --no-memory and --memory-file."""
    if kept is False and file is not None:
        raise InputError("--no-memory keeps no perturbations, in --memory-file neither: say one")
    return file or kept


def criterion(
    kind: str | None, smoothing: float, weights: str | None, data: Dataset, net: nn.Module
) -> Criterion | None:
    """Return the loss of --criterion, --smoothing and --class-weights.

    None for what the labels suggest.
    """
    if kind is None and smoothing == 0 and weights is None:
        return None
    if weights is None:
        return Criterion(kind or "cross_entropy", smoothing)
    if weights == "balanced":
        chosen = _balanced(data, net)
    else:
        chosen = torch.tensor([_weight(part) for part in weights.split(",")], dtype=torch.float64)
    return Criterion(kind or "cross_entropy", smoothing, weights=chosen)


def _balanced(data: Dataset, net: nn.Module) -> Tensor:
    """n / (K nₖ) for the nₖ of n samples in class k of the K that the network has.

    A class without samples has the weight of one with a single sample, which nothing meets.
    """
    model, dtype = judged(net, Criterion()), next(net.parameters()).dtype
    with model.session():
        y = labels(model, torch.as_tensor(data.x).to(dtype), data.y)
    counts = torch.bincount(y, minlength=int(model.num_classes or 0))
    return len(y) / (len(counts) * counts.double().clamp_min(1))


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
