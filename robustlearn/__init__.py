"""Adversarial robustness with two-sided numbers: certified ≤ true ≤ attacked.

Names are loaded on first use, so that ``import robustlearn`` (and ``robustlearn --help``)
does not wait for torch.
"""

import importlib
import random
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustlearn.certify import Certificate, certify
    from robustlearn.errors import InputError
    from robustlearn.evaluate import Report, evaluate
    from robustlearn.gan import GanResult, fit_gan
    from robustlearn.models import Model, wrap
    from robustlearn.tabular import Tabular
    from robustlearn.threats import LpBall
    from robustlearn.train import TrainingResult, fit

__all__ = [
    "Certificate",
    "GanResult",
    "InputError",
    "LpBall",
    "Model",
    "Report",
    "Tabular",
    "TrainingResult",
    "certify",
    "evaluate",
    "fit",
    "fit_gan",
    "wrap",
]

_HOME = {
    "Certificate": "certify",
    "GanResult": "gan",
    "InputError": "errors",
    "LpBall": "threats",
    "Model": "models",
    "Report": "evaluate",
    "Tabular": "tabular",
    "TrainingResult": "train",
    "certify": "certify",
    "evaluate": "evaluate",
    "fit": "train",
    "fit_gan": "gan",
    "wrap": "models",
}
_MODULES = (
    "anomaly",
    "attacks",
    "data",
    "gan",
    "linear",
    "loop",
    "losses",
    "models",
    "tabular",
    "threats",
)


def __getattr__(name: str) -> Any:
    drawn = random.getstate()  # libraries draw from it as they are imported
    try:
        if name in _HOME:
            value = getattr(importlib.import_module(f"robustlearn.{_HOME[name]}"), name)
        elif name in _MODULES:
            value = importlib.import_module(f"robustlearn.{name}")
        else:
            raise AttributeError(f"module 'robustlearn' has no attribute {name!r}")
    finally:
        random.setstate(drawn)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(types.ModuleType):
    """Keeps ``robustlearn.certify`` and ``robustlearn.evaluate`` the functions of that name.

    The import system binds every submodule to its parent, and would put the folders there.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
