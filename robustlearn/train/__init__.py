"""Training networks for the worst case."""

from robustlearn.train.fit import TrainingResult, fit
from robustlearn.train.objectives import OBJECTIVES, Criterion, Outcome
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
