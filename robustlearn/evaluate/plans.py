"""Which attacks run, in which order, and on which samples."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError

SCOPES = ("all", "near", "audit", "masked")
COUNTS = ("restarts", "targets", "searches", "steps", "queries")  # in the order they are cut


@dataclass(frozen=True)
class Step:
    """One attack of a plan.

    Attributes
    ----------
    scope : ``"all"`` samples that stand; the quarter ``"near"`` the boundary; an ``"audit"`` of a
        random few, which grows to all if it breaks one, or if the model seems to mask its
        gradient; or all, but only if it is ``"masked"``.
    """

    name: str
    options: dict[str, Any]
    scope: str = "all"

    @property
    def label(self) -> str:
        """Name, options and scope as they are written in text."""
        whole = ":".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])
        return whole if self.scope == "all" else f"{whole}@{self.scope}"

    @property
    def needs(self) -> str:
        """What the attack needs of a model."""
        return str(ATTACKS[self.name].facts["needs"])

    @property
    def calls(self) -> dict[str, int]:
        """Factors of how often a sample goes through the model: the options that count it."""
        known = inspect.signature(ATTACKS[self.name].function).parameters
        return {
            key: max(1, self.options.get(key, known[key].default))
            for key in COUNTS
            if key in known and isinstance(known[key].default, int)
        }


def _steps(*rows: tuple[Any, ...]) -> tuple[Step, ...]:
    return tuple(Step(*row) for row in rows)


PRESETS: dict[str, tuple[Step, ...]] = {
    "quick": _steps(
        ("linear_exact", {}),
        ("pgd", {"steps": 25}),
        ("fmn", {"steps": 25}),
        ("square", {"queries": 200}, "audit"),
        ("retreat", {"queries": 200}, "masked"),
    ),
    "standard": _steps(
        ("linear_exact", {}),
        ("pgd", {"steps": 20, "restarts": 3}),
        ("fmn", {"steps": 25}),
        ("carlini_wagner", {"steps": 40, "searches": 1, "step_size": 0.1}),
        ("pgd", {"steps": 40, "restarts": 4}, "near"),
        ("sigma_zero", {"steps": 100}),
        ("square", {"queries": 1000}, "audit"),
        ("square", {"queries": 5000}, "masked"),
        ("fab", {"steps": 20}, "masked"),
        ("retreat", {"queries": 1000}, "masked"),
    ),
    "thorough": _steps(
        ("linear_exact", {}),
        ("pgd", {"steps": 100, "restarts": 10}),
        ("apgd", {"loss": "cross_entropy", "steps": 100, "restarts": 2}),
        ("apgd", {"loss": "dlr", "targets": 9, "steps": 100}),
        ("fab", {"steps": 100, "rivals": 9}),
        ("fmn", {"steps": 200}),
        ("sigma_zero", {"steps": 500}),
        ("carlini_wagner", {"steps": 40, "searches": 6, "step_size": 0.1}),
        ("square", {"queries": 5000}),
        ("nes", {"queries": 2000}, "audit"),
        ("retreat", {"queries": 2000}, "audit"),
    ),
    "autoattack": _steps(
        ("apgd", {"loss": "cross_entropy", "steps": 100}),
        ("apgd", {"loss": "dlr", "targets": 9, "steps": 100}),
        ("fab", {"steps": 100, "rivals": 9}),
        ("square", {"queries": 5000}),
    ),
}


def plan(attacks: str | Sequence[Any]) -> list[Step]:
    """Return the steps of a preset, or of a list of names, (name, options) pairs and `Step`s.

    In text options follow the name, and a scope ends it:
    ``"fgsm,pgd:steps=100:restarts=3,square:queries=500@audit"``.
    """
    if isinstance(attacks, str) and attacks in PRESETS:
        chosen = list(PRESETS[attacks])
    else:
        listed = attacks.split(",") if isinstance(attacks, str) else attacks
        chosen = [_step(item) for item in listed]
    if not chosen:
        raise InputError("name at least one attack")
    for step in chosen:
        if step.name not in ATTACKS:
            presets = ", ".join(PRESETS)
            raise InputError(
                f"there is no attack named {step.name!r}; there are {', '.join(ATTACKS)}, and the "
                f"presets {presets}"
            )
        if step.scope not in SCOPES:
            raise InputError(f"{step.label}: a scope is one of {', '.join(SCOPES)}")
        _check_options(step.name, step.options)
    return chosen


@dataclass(frozen=True)
class Budget:
    """The most gradients and forward passes that a sample may cost; None for no limit."""

    gradients: int | None = None
    forwards: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read ``"gradients=60,forwards=500"``, or one of the two."""
        found: dict[str, int] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if not equals or key not in ("gradients", "forwards") or not value.isdigit():
                raise InputError(
                    f"write a budget as gradients=60,forwards=500 or one of them; got {text!r}"
                )
            found[key] = int(value)
        return cls(**found)

    def less(self, spent: "Budget") -> "Budget":
        """Return what is left."""
        return Budget(
            None if self.gradients is None else max(0, self.gradients - (spent.gradients or 0)),
            None if self.forwards is None else max(0, self.forwards - (spent.forwards or 0)),
        )

    def plus(self, step: Step) -> "Budget":
        """Add what a sample that stands throughout a step costs; a gradient takes a pass too."""
        calls = math.prod(step.calls.values())
        gradients = calls if step.needs == "gradient" else 0
        return Budget((self.gradients or 0) + gradients, (self.forwards or 0) + calls)

    def trimmed(self, step: Step) -> Step | None:
        """Return the step with what is affordable: restarts go first, steps last. None for none."""
        limits = [self.forwards, self.gradients if step.needs == "gradient" else None]
        most = min((limit for limit in limits if limit is not None), default=None)
        if most is None or step.needs == "affine":
            return step
        calls, options = step.calls, dict(step.options)
        for key in calls:
            total = math.prod(calls.values())
            if total > most:
                calls[key] = options[key] = max(1, calls[key] * most // total)
        return replace(step, options=options) if math.prod(calls.values()) <= most else None

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        named = {"gradients": self.gradients, "forwards": self.forwards}
        return ",".join(f"{key}={limit}" for key, limit in named.items() if limit is not None)


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


def _step(item: Any) -> Step:
    if isinstance(item, Step):
        return item
    return _parse(item.strip()) if isinstance(item, str) else Step(*item)


def _parse(text: str) -> Step:
    whole, at, scope = text.partition("@")
    name, *given = whole.split(":")
    options: dict[str, Any] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"write options of an attack as name:key=value; got {text!r}")
        options[key] = _value(value)
    return Step(name, options, scope if at else "all")


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
