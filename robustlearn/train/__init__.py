"""Training networks for the worst case."""

from robustlearn.train.certified import interval_init_
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
    "interval_init_",
    "validate",
]
