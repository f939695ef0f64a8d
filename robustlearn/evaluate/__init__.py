"""Attacks from above, certificates from below: one two-sided answer."""

from robustlearn.evaluate.ensemble import evaluate
from robustlearn.evaluate.plans import PRESETS, plan
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
