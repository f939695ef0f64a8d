"""The checks behind a verdict: each looks at the probes and says what it found.

A new check is one function in a file of this folder under the `check` decorator: `diagnose`, the
report and the command line find it in `CHECKS`.
"""

from robustlearn.evaluate.checks import gradients, outputs, record, rivals
from robustlearn.evaluate.checks.base import CHECKS, check, unsuitable

__all__ = ["CHECKS", "check", "gradients", "outputs", "record", "rivals", "unsuitable"]
