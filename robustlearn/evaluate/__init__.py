"""Attacks from above, certificates from below: one two-sided answer."""

from robustlearn.evaluate.binarisation import UnitTest, unit_test
from robustlearn.evaluate.checks import CHECKS
from robustlearn.evaluate.diagnostics import Finding, Verdict, diagnose
from robustlearn.evaluate.ensemble import evaluate
from robustlearn.evaluate.plans import PRESETS, plan
from robustlearn.evaluate.results import AttackRun, Estimate, Report, Sample, document, save

__all__ = [
    "CHECKS",
    "PRESETS",
    "AttackRun",
    "Estimate",
    "Finding",
    "Report",
    "Sample",
    "UnitTest",
    "Verdict",
    "diagnose",
    "document",
    "evaluate",
    "plan",
    "save",
    "unit_test",
]
