"""Attacks from above, certificates from below: one two-sided answer."""

from robustlearn.evaluate.ensemble import PRESETS, evaluate, plan
from robustlearn.evaluate.results import AttackRun, Estimate, Report, Sample, document, save

__all__ = [
    "PRESETS",
    "AttackRun",
    "Estimate",
    "Report",
    "Sample",
    "document",
    "evaluate",
    "plan",
    "save",
]
