"""Anything that classifies or predicts, as one kind of object: `wrap`."""

from typing import Any

import numpy as np
from torch import nn

from robustlearn.errors import InputError
from robustlearn.models.around import Expectation, Guided
from robustlearn.models.base import Model, Output, Task
from robustlearn.models.estimators import EstimatorModel, TreeModel, wrap_estimator
from robustlearn.models.functions import FunctionModel
from robustlearn.models.labels import check_range, labels
from robustlearn.models.network import TorchModel
from robustlearn.models.smoothed import Smoothed

__all__ = [
    "EstimatorModel",
    "Expectation",
    "FunctionModel",
    "Guided",
    "Model",
    "Smoothed",
    "TorchModel",
    "TreeModel",
    "check_range",
    "labels",
    "wrap",
]


def wrap(
    model: Any,
    *,
    task: Task | None = None,
    output: Output = "auto",
    num_classes: int | None = None,
) -> Model:
    """Wrap a torch module, a scikit-learn estimator or pipeline, or a callable.

    Parameters
    ----------
    model : what to wrap. Linear and multi-layer-perceptron estimators, also behind affine steps
        of a pipeline, become exact differentiable twins in float64; of trees (scikit-learn's,
        XGBoost's, LightGBM's) the leaves are known; other estimators and callables on numpy or
        torch arrays become black boxes. An anomaly detector becomes a classifier of −1 (flagged,
        logit 0) and 1 (accepted, its decision as logit): those of `robustlearn.anomaly` with
        gradients, others of scikit-learn as black boxes.
    task : ``"classification"`` or ``"regression"``; needed only where the model has a single
        output and no labels are given to tell.
    output : ``"logits"``, ``"probabilities"``, or ``"auto"``, which recognises probabilities
        and says so.
    num_classes : for a callable that returns predicted labels.

    Returns
    -------
    A `Model`; one that is wrapped already is returned as it is.

    Raises
    ------
    InputError for what is none of these, or an estimator that is not fitted.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(2, 3)
    >>> wrap(net)(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """
    if isinstance(model, Model):
        return model
    if hasattr(model, "as_network"):
        return TorchModel(
            model.as_network(),
            source=model,
            task="classification",
            classes=np.array([-1, 1]),
            output="logits",
        )
    if isinstance(model, nn.Module):
        return TorchModel(model, task=task, output=output)
    if hasattr(model, "predict") or hasattr(model, "predict_proba"):
        return wrap_estimator(model, output=output)
    if isinstance(model, type):
        raise InputError(f"{model.__name__} is a class: make an instance of it first")
    if callable(model):
        return FunctionModel(model, task=task, output=output, num_classes=num_classes)
    kind = "array" if isinstance(model, np.ndarray) else type(model).__name__
    raise InputError(
        f"cannot wrap a {kind}: expected a torch module, a fitted scikit-learn estimator or a "
        "callable that maps a batch to scores"
    )
