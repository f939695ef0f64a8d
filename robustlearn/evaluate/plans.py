"""Which attacks run, in which order."""

import inspect
from collections.abc import Sequence
from typing import Any

from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError

Step = tuple[str, dict[str, Any]]
PRESETS: dict[str, tuple[Step, ...]] = {
    "quick": (
        ("linear_exact", {}),
        ("fgsm", {}),
        ("pgd", {"steps": 20}),
        ("square", {"queries": 200}),
    ),
    "standard": (
        ("linear_exact", {}),
        ("fgsm", {}),
        ("pgd", {"steps": 40}),
        ("pgd", {"steps": 40, "loss": "cross_entropy"}),
        ("pgd", {"steps": 40, "restarts": 10}),
        ("square", {"queries": 1000}),
    ),
}


def plan(attacks: str | Sequence[Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return [(label, name, options)] for a preset, a list of names, or (name, options) pairs.

    In text, options follow the name: ``"fgsm,pgd:steps=100:restarts=3"``.
    """
    chosen: list[Step] = []
    if isinstance(attacks, str) and attacks in PRESETS:
        chosen = list(PRESETS[attacks])
    else:
        listed = attacks.split(",") if isinstance(attacks, str) else attacks
        for item in listed:
            chosen.append(_parse(item.strip()) if isinstance(item, str) else (item[0], item[1]))
    if not chosen:
        raise InputError("name at least one attack")
    steps = []
    for name, options in chosen:
        if name not in ATTACKS:
            presets = ", ".join(PRESETS)
            raise InputError(
                f"there is no attack named {name!r}; there are {', '.join(ATTACKS)}, and the "
                f"presets {presets}"
            )
        _check_options(name, options)
        label = ":".join([name, *(f"{key}={value}" for key, value in options.items())])
        steps.append((label, name, options))
    return steps


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Raise an InputError for an option that the attack does not have, or of another type."""
    known = inspect.signature(ATTACKS[name].function).parameters
    for key, value in options.items():
        if key not in known or known[key].kind is not inspect.Parameter.KEYWORD_ONLY:
            names = [k for k, p in known.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
            raise InputError(f"{name} has no option {key!r}; it has {', '.join(names)}")
        default = known[key].default
        wrong = isinstance(default, bool) != isinstance(value, bool) and default is not None
        wrong |= isinstance(default, int) and key != "generator" and not isinstance(value, int)
        wrong |= isinstance(default, float) and not isinstance(value, int | float)
        wrong |= isinstance(default, str) and not isinstance(value, str)
        if wrong:
            raise InputError(f"{name}: {key} must be like {default!r}; got {value!r}")


def _parse(text: str) -> Step:
    name, *given = text.split(":")
    options: dict[str, Any] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"write options of an attack as name:key=value; got {text!r}")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
