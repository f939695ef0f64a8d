"""Anomaly detection by hard negatives, and the baseline that is hard to beat."""

from robustlearn.anomaly.base import Detector
from robustlearn.anomaly.baseline import MeanNeighborDetector
from robustlearn.anomaly.conformal import p_values
from robustlearn.anomaly.detector import HardNegativeDetector
from robustlearn.anomaly.explanation import Explanation

__all__ = [
    "Detector",
    "Explanation",
    "HardNegativeDetector",
    "MeanNeighborDetector",
    "p_values",
]
