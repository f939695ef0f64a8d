"""Training networks for the worst case."""

from robustlearn.train import certified as _certified  # noqa: F401  files its objectives
from robustlearn.train.objectives import OBJECTIVES, Criterion, Outcome
from robustlearn.train.training import TrainingResult, fit
from robustlearn.train.validation import Standing, validate

__all__ = [
    "OBJECTIVES",
    "Criterion",
    "Outcome",
    "Standing",
    "TrainingResult",
    "fit",
    "validate",
]
