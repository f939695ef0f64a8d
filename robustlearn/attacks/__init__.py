"""Attacks: functions ``(model, x, y, threat, *, …) -> x_adv`` that try to break a model.

A new attack is one function in a file of this folder under the `attack` decorator: the command
line, the contract tests and the report find it in `ATTACKS`.
"""

import importlib
import pkgutil

from robustlearn.attacks.base import ATTACKS, attack, unsuitable
from robustlearn.attacks.transfer import transfer
from robustlearn.attacks.universal import universal

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _name, _entry in ATTACKS.items():
    globals()[_name] = _entry.function

__all__ = ["ATTACKS", "attack", "transfer", "universal", "unsuitable", *ATTACKS]
