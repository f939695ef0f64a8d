"""What tells one model from another, so that an evaluation does not go on with a changed one."""

import hashlib
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn.errors import ModelError
from robustlearn.evaluate import draws
from robustlearn.evaluate.harness import Harness
from robustlearn.models import Model, TorchModel

LOOKED_AT = 4  # samples whose outputs and gradients are compared


def identity(model: Model) -> str:
    """Return a hash of the class of the model, its settings and its weights.

    Weights are those of a torch module; of an estimator its parameters as it prints them; other
    callables are told apart by their name, and by what `behaviour` measures.
    """
    named = f"{type(model.source).__module__}.{type(model.source).__qualname__} {model.name}"
    digest = hashlib.sha256(f"{named} {model.task} {model.dtype}".encode())
    if hasattr(model.source, "get_params"):
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(model.source)).encode())
    if isinstance(model, TorchModel):
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(model.module)).encode())
        for name, value in model.module.state_dict().items():
            digest.update(name.encode() + _bytes(value))
    return digest.hexdigest()


def behaviour(harness: Harness, clean: Tensor) -> dict[str, np.ndarray]:
    """Return clean outputs, and outputs and gradients at a few random samples, one at a time.

    One by one they are the same to the last bits whatever the batch size; the outputs of all
    differ with it by rounding. Random models draw the same numbers each time.
    """
    model, there = harness.model, harness.model.device
    rows = draws.shuffled(harness.seed, harness.numbers, use=2)[:LOOKED_AT]
    outputs, gradients = [], []
    with model.session(), torch.no_grad():
        for row in rows.split(1):
            x, y = harness.x[row].to(there), harness.y[row].to(there)
            outputs.append(model(x).cpu())
            gradients.append(_gradient(model, x, y, harness))
    return {
        "clean": clean.numpy(),
        "outputs": torch.cat(outputs).numpy(),
        "gradients": torch.cat(gradients).numpy(),
    }


def _gradient(model: Model, x: Tensor, y: Tensor, harness: Harness) -> Tensor:
    """Return the gradient at x, or zero where there is none."""
    try:
        return model.gradient(x, y, harness.loss)[0].cpu() if model.differentiable else 0 * x.cpu()
    except ModelError:
        return 0 * x.cpu()


def _bytes(value: Any) -> bytes:
    """Return the bytes of a tensor, or how anything else prints."""
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return raw.numpy().tobytes()
    return repr(value).encode()
