"""Options of attacks: read from text, and checked against the signature of the attack."""

import inspect
import numbers
from typing import Any, get_args

import numpy as np

from robustlearn import losses
from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError
from robustlearn.registry import parsed as named


def parsed(text: str) -> tuple[str, dict[str, Any], str]:
    """Read ``"name:key=value@scope"``: name, options, and scope (``"all"`` if there is none)."""
    whole, at, scope = text.partition("@")
    name, options = named(whole)
    return name, options, scope if at else "all"


def checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with plain numbers.

    Raises an InputError for an option that the attack does not have, of another type, or for a
    loss that is unknown or aims at y.
    """
    known = inspect.signature(ATTACKS[name].function).parameters
    for key, value in options.items():
        if key not in known or known[key].kind is not inspect.Parameter.KEYWORD_ONLY:
            names = [k for k, p in known.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
            raise InputError(f"{name} has no option {key!r}; it has {', '.join(names)}")
        if not _fits(value, known[key].annotation):
            kind = _told(known[key])
            raise InputError(f"{name}: {key} must be {kind}; got {value!r}")
    if options.get("loss") is not None:
        _check_loss(name, options["loss"])
    return {key: v.item() if isinstance(v, np.generic) else v for key, v in options.items()}


def _check_loss(name: str, loss: Any) -> None:
    """Raise an InputError for a loss that is not known, or that makes y the class to reach."""
    if isinstance(loss, str) and loss not in losses.LOSSES:
        raise InputError(f"{name}: there is no loss {loss!r}; there are {', '.join(losses.LOSSES)}")
    chosen = losses.LOSSES[loss] if isinstance(loss, str) else loss
    if isinstance(chosen, losses.Loss) and chosen.targeted:
        raise InputError(
            f"{name}: {chosen.name} pushes towards y, which is the true class here, so that it "
            "would break nothing; for attacks on each rival class give apgd targets=9, or other "
            "attacks more restarts="
        )


def _fits(value: Any, annotation: Any) -> bool:
    """Tell whether a value is of the type that the signature names."""
    kinds = get_args(annotation) or (annotation,)
    if Any in kinds:
        return True
    if isinstance(value, bool | np.bool_):
        return bool in kinds
    if isinstance(value, numbers.Integral):
        return int in kinds or float in kinds
    if isinstance(value, numbers.Real):
        return float in kinds
    return isinstance(value, tuple(kinds))


def _told(parameter: inspect.Parameter) -> str:
    """Say what an option must be."""
    if parameter.default is not None:
        return f"like {parameter.default!r}"
    kinds = [kind.__name__ for kind in get_args(parameter.annotation)]
    return " or ".join(kind for kind in kinds if kind != "NoneType")
