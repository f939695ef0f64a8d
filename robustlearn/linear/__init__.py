"""Linear models under attack: exact worst cases, certified training, honest comparison."""

from robustlearn.linear.closed_form import (
    certified_radius,
    eps_max,
    interpolation_threshold,
    worst_case_input,
    worst_case_loss,
)
from robustlearn.linear.comparison import Comparison, robust_comparison
from robustlearn.linear.estimators import AdversarialClassifier, AdversarialRegressor
from robustlearn.linear.path import Path, regularization_path
from robustlearn.linear.search import AdversarialClassifierCV, AdversarialRegressorCV

__all__ = [
    "AdversarialClassifier",
    "AdversarialClassifierCV",
    "AdversarialRegressor",
    "AdversarialRegressorCV",
    "Comparison",
    "Path",
    "certified_radius",
    "eps_max",
    "interpolation_threshold",
    "regularization_path",
    "robust_comparison",
    "worst_case_input",
    "worst_case_loss",
]
