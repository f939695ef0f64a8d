"""Which attacks run, in which order, and on which samples."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError

SCOPES = ("all", "near", "audit")


@dataclass(frozen=True)
class Step:
    """One attack of a plan.

    Attributes
    ----------
    scope : ``"all"`` samples that stand; the quarter ``"near"`` the boundary; or an ``"audit"``
        of a random few, which grows to all if it breaks one, or if the model seems to mask its
        gradient.
    """

    name: str
    options: dict[str, Any]
    scope: str = "all"

    @property
    def label(self) -> str:
        """Name, options and scope as they are written in text."""
        whole = ":".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])
        return whole if self.scope == "all" else f"{whole}@{self.scope}"


def _steps(*rows: tuple[Any, ...]) -> tuple[Step, ...]:
    return tuple(Step(*row) for row in rows)


PRESETS: dict[str, tuple[Step, ...]] = {
    "quick": _steps(
        ("linear_exact", {}),
        ("pgd", {"steps": 40}),
        ("sigma_zero", {"steps": 50}),
        ("square", {"queries": 200}, "audit"),
        ("retreat", {"queries": 200}, "audit"),
    ),
    "standard": _steps(
        ("linear_exact", {}),
        ("pgd", {"steps": 20}),
        ("pgd", {"steps": 20, "restarts": 5}),
        ("apgd", {"loss": "dlr", "targets": 3, "steps": 30}, "near"),
        ("fab", {"steps": 20, "rivals": 3}, "near"),
        ("sigma_zero", {"steps": 150}),
        ("square", {"queries": 1000}, "audit"),
        ("retreat", {"queries": 1000}, "audit"),
    ),
    "thorough": _steps(
        ("linear_exact", {}),
        ("pgd", {"steps": 100, "restarts": 10}),
        ("apgd", {"loss": "cross_entropy", "steps": 100, "restarts": 2}),
        ("apgd", {"loss": "dlr", "targets": 9, "steps": 100}),
        ("fab", {"steps": 100, "rivals": 9}),
        ("fmn", {"steps": 200}),
        ("sigma_zero", {"steps": 500}),
        ("square", {"queries": 5000}),
        ("nes", {"steps": 50}, "audit"),
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

    def left(self, gradients: float, forwards: float) -> "Budget":
        """Return what is left after so much a sample."""
        return Budget(
            None if self.gradients is None else max(0, int(self.gradients - gradients)),
            None if self.forwards is None else max(0, int(self.forwards - forwards)),
        )

    def trimmed(self, step: Step) -> Step | None:
        """Return the step with what is affordable, or None.

        The first to go are restarts, then targets, then steps and queries.
        """
        limits = [limit for limit in (self.gradients, self.forwards) if limit is not None]
        facts = ATTACKS[step.name].facts
        if facts["needs"] in ("scores", "labels"):
            limits = [limit for limit in (self.forwards,) if limit is not None]
        if facts["needs"] == "affine" or not limits:
            return step
        most, options = min(limits), dict(step.options)
        known = inspect.signature(ATTACKS[step.name].function).parameters
        spends = {
            key: int(options.get(key, known[key].default)) or 1
            for key in ("restarts", "targets", "searches", "rivals", "steps", "queries")
            if key in known
        }
        for key, count in spends.items():
            others = 1
            for other, value in spends.items():
                others *= value if other != key else 1
            if others * count > most:
                spends[key] = max(1, most // others)
                options[key] = spends[key]
        total = 1
        for value in spends.values():
            total *= value
        return None if total > most else replace(step, options=options)


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
