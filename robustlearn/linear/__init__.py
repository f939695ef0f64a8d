"""Linear models under attack: exact worst cases, certified training, honest comparison."""

from robustlearn.linear.closed_form import (
    eps_max,
    interpolation_threshold,
    worst_case_input,
    worst_case_loss,
)
from robustlearn.linear.estimators import AdversarialClassifier, AdversarialRegressor

__all__ = [
    "AdversarialClassifier",
    "AdversarialRegressor",
    "eps_max",
    "interpolation_threshold",
    "worst_case_input",
    "worst_case_loss",
]
