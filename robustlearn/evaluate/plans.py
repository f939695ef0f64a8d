"""Which attacks run, in which order, and on which samples."""

import bisect
import inspect
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError
from robustlearn.evaluate.options import checked, parsed

SHARES = {"near": 1 / 4, "closest": 1 / 16}  # of the samples that stand, nearest first
SCOPES = ("all", *SHARES, "audit", "masked")
COUNTS = ("restarts", "targets", "searches", "steps", "queries")  # in the order they are cut
MANY = 1000  # classes, where their number is not known
PER_RIVAL = ("deepfool", "fab")  # each of their steps looks at every rival
HALVINGS = 6  # of a segment, forward passes of one polishing step
DAMPED = 5  # forward passes of a step that may be halved four times


@dataclass(frozen=True)
class Step:
    """One attack of a plan.

    Attributes
    ----------
    scope : ``"all"`` samples that stand; the quarter ``"near"`` the boundary, or the sixteenth
        ``"closest"`` to it (of a regressor those whose loss has grown most); an ``"audit"`` of a
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

    def defined(self, classes: int) -> "Step":
        """Return the step with the margin in place of dlr, where that has too few classes.

        It needs three of them, and four where it aims at one rival after the other.
        """
        needed = 4 if self.options.get("targets") else 3
        if classes >= needed or self.options.get("loss") != "dlr":
            return self
        return replace(self, options={**self.options, "loss": "margin"})

    def option(self, key: str) -> Any:
        """Return an option as it is given, or its default; None if the attack does not have it."""
        known = inspect.signature(ATTACKS[self.name].function).parameters
        return self.options.get(key, known[key].default) if key in known else None

    @property
    def counts(self) -> dict[str, int]:
        """The options that say how often a sample goes through the model."""
        given = {key: self.option(key) for key in COUNTS}
        return {key: max(1, count) for key, count in given.items() if isinstance(count, int)}

    def least(self, key: str) -> int:
        """Return the smallest count that the attack takes: `nes` needs the queries of one step."""
        directions = self.option("directions") if key == "queries" else None
        return 1 if directions is None else 2 * int(directions) + 2

    def cost(self, classes: int = MANY, halvings: int = HALVINGS) -> "Budget":
        """Return what a sample that stands throughout costs at most; a gradient takes a pass too.

        Parameters
        ----------
        classes : of the model, one more than the rivals that there are to aim at.
        halvings : forward passes that one polishing step of a minimal-norm attack may take.
        """
        rivals, counts = max(1, classes - 1), self.counts
        if "targets" in counts:
            counts["targets"] = min(counts["targets"], rivals)
        calls = math.prod(counts.values())
        if self.needs != "gradient":
            return Budget(0, 0 if self.needs in ("affine", "trees") else calls)
        if not counts:
            return Budget(1, 1)
        runs = calls // counts.get("steps", 1)
        if ATTACKS[self.name].facts["minimal"]:
            return self._hunt(calls, runs, rivals, halvings)
        again = calls if self.option("precision") is not None else 0  # what looks broken
        return Budget(calls, calls + 2 * runs + 1 + again)

    def _hunt(self, calls: int, runs: int, rivals: int, halvings: int) -> "Budget":
        """Return the cost of a minimal-norm attack with its first look at rivals and its end."""
        rivals, polish = min(rivals, self.option("rivals") or 0), self.option("polish") or 0
        climbs = calls * rivals if self.name in PER_RIVAL else calls + rivals
        damped = {"deepfool": calls, "fab": climbs}.get(self.name, 0) * DAMPED
        gradients = climbs + polish + 1
        return Budget(gradients, gradients + runs + damped + (1 + halvings) * polish + 5)


def _steps(*rows: tuple[Any, ...]) -> tuple[Step, ...]:
    return tuple(Step(*row) for row in rows)


PRESETS: dict[str, tuple[Step, ...]] = {
    "quick": _steps(
        ("linear_exact", {}),
        ("tree_exact", {}),
        ("pgd", {"steps": 25}),
        ("fmn", {"steps": 20}),
        ("square", {"queries": 200}, "audit"),
        ("retreat", {"queries": 200}, "masked"),
    ),
    "standard": _steps(
        ("linear_exact", {}),
        ("tree_exact", {}),
        ("pgd", {"steps": 20, "restarts": 2}),
        ("fmn", {"steps": 25}),
        ("pgd", {"steps": 20, "restarts": 8, "starts": "mixed"}, "near"),
        ("pgd", {"steps": 20, "restarts": 32, "starts": "mixed"}, "closest"),
        ("sigma_zero", {"steps": 100}),
        ("carlini_wagner", {"steps": 40, "searches": 1, "step_size": 0.1}, "masked"),
        ("square", {"queries": 1000}, "audit"),
        ("square", {"queries": 5000}, "masked"),
        ("fab", {"steps": 20}, "masked"),
        ("retreat", {"queries": 1000}, "masked"),
    ),
    "thorough": _steps(
        ("linear_exact", {}),
        ("tree_exact", {}),
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


UNUSUAL = _steps(("fgsm", {}), ("deepfool", {"steps": 10, "rivals": 3}))


def widened(steps: Sequence[Step], p: float) -> list[Step]:
    """Return the steps of a preset, and what knows any norm where p is not 1, 2 or ∞."""
    more = () if p in (1, 2, math.inf) else UNUSUAL
    return [*steps, *more]


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
    return [replace(step, options=checked(step.name, step.options)) for step in chosen]


@dataclass(frozen=True)
class Budget:
    """The most gradients and forward passes that a sample may cost; None for no limit."""

    gradients: int | None = None
    forwards: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("gradients", self.gradients), ("forwards", self.forwards)):
            whole = isinstance(limit, numbers.Integral) and not isinstance(limit, bool)
            if limit is not None and not (whole and limit >= 0):
                raise InputError(f"{name} must be a whole number from 0, or None; got {limit!r}")

    @classmethod
    def of(cls, given: Any) -> "Budget":
        """Return a budget, one from text, or none, where None is given."""
        if isinstance(given, cls):
            return given
        if given is None or isinstance(given, str):
            return cls() if given is None else cls.parse(given)
        raise InputError(
            "a budget is text as gradients=60,forwards=500, a Budget, or None; got "
            f"{type(given).__name__}"
        )

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read ``"gradients=60,forwards=500"``, or one of the two."""
        found: dict[str, int] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            known = key in ("gradients", "forwards") and key not in found
            if not (known and equals and value.isdecimal()):
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

    def plus(self, cost: "Budget") -> "Budget":
        """Add what a step costs."""
        return Budget(
            (self.gradients or 0) + (cost.gradients or 0),
            (self.forwards or 0) + (cost.forwards or 0),
        )

    def covers(self, cost: "Budget") -> bool:
        """Tell whether a step that costs so much can be paid."""
        pairs = ((self.gradients, cost.gradients), (self.forwards, cost.forwards))
        return all(limit is None or (price or 0) <= limit for limit, price in pairs)

    def trimmed(self, step: Step, classes: int = MANY, halvings: int = HALVINGS) -> Step | None:
        """Return the step with what is affordable: restarts go first, steps last. None for none.

        Parameters
        ----------
        classes, halvings : as for `Step.cost`.
        """
        for key in step.counts:
            step = self._shortened(step, key, classes, halvings)
        return step if self.covers(step.cost(classes, halvings)) else None

    def _shortened(self, step: Step, key: str, classes: int, halvings: int) -> Step:
        """Return the step with the largest affordable count, or the least that there is."""

        def sized(size: int) -> Step:
            return replace(step, options={**step.options, key: size})

        if self.covers(step.cost(classes, halvings)) or step.counts[key] <= step.least(key):
            return step
        sizes = range(step.least(key) + 1, step.counts[key])
        steps = bisect.bisect(
            sizes, False, key=lambda size: not self.covers(sized(size).cost(classes, halvings))
        )
        return sized(step.least(key) + steps)

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        named = {"gradients": self.gradients, "forwards": self.forwards}
        return ",".join(f"{key}={limit}" for key, limit in named.items() if limit is not None)


def _step(item: Any) -> Step:
    if isinstance(item, Step):
        return item
    return Step(*parsed(item.strip())) if isinstance(item, str) else Step(*item)
