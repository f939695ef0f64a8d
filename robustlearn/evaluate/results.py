"""What an evaluation found: one row a sample first, totals with intervals derived from them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import robustlearn
from robustlearn import report as rendering
from robustlearn.evaluate.sharing import first

EXAMPLES = 8  # samples shown in a report
CURVE_POINTS = 61


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def proportion(cls, successes: int, n: int) -> "Estimate":
        """Share of successes with Clopper and Pearson's exact interval.

        Examples
        --------
        >>> e = Estimate.proportion(9, 10)
        >>> round(e.value, 3), round(e.low, 3), round(e.high, 3)
        (0.9, 0.555, 0.997)
        """
        low = 0.0 if successes == 0 else float(stats.beta.ppf(0.025, successes, n - successes + 1))
        high = 1.0 if successes == n else float(stats.beta.ppf(0.975, successes + 1, n - successes))
        return cls(successes / n, low, high, n)

    @classmethod
    def mean(cls, values: np.ndarray) -> "Estimate":
        """Mean with Student's interval; the interval of one value is unbounded."""
        n, value = len(values), float(np.mean(values))
        if n == 1 or not math.isfinite(value):
            return cls(value, -math.inf, math.inf, n)
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
        return cls(value, value - half, value + half, n)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"


@dataclass(frozen=True)
class Sample:
    """What is known about one sample; a field is None where it has no meaning.

    Classifiers: clean_correct; broken_by, the attack that broke it (None if it stands, or was
    wrong from the start); distance, the norm of the smallest change known to break it (0 if it
    was wrong from the start); certified, whether the whole threat is proven harmless; status,
    where there is a certificate: certified, falsified or open; radius, the distance proven safe;
    the clean margin and the smallest that was found; the prediction at the end. Regressors: squared
    errors, clean, under attack, and certified. ``digest`` tells the features of one sample from
    those of another.
    """

    index: int
    label: Any
    digest: str | None = None
    clean_correct: bool | None = None
    broken_by: str | None = None
    distance: float | None = None
    prediction: Any = None
    certified: bool | None = None
    status: str | None = None
    radius: float | None = None
    clean_margin: float | None = None
    attacked_margin: float | None = None
    clean_loss: float | None = None
    attacked_loss: float | None = None
    certified_loss: float | None = None

    def __getitem__(self, field_name: str) -> Any:
        try:
            return getattr(self, field_name)
        except (AttributeError, TypeError):
            raise KeyError(field_name) from None


@dataclass(frozen=True)
class Audit:
    """An attack that was tried on a random part of the samples, and broke none of it.

    ``bound`` is the share of those left out that it would break at most, with 95% confidence:
    1 − 0.05^(1/tried), Clopper and Pearson's one-sided limit for nothing found. ``effort`` is what
    it spent on each, as "15 queries".
    """

    tried: int
    left: int
    effort: str = field(default="", compare=False)

    @property
    def bound(self) -> float:
        """The share, as above."""
        return float(1 - 0.05 ** (1 / self.tried))

    def __str__(self) -> str:
        spent = f" with {self.effort} each" if self.effort else ""
        return (
            f"tried{spent} on {self.tried} samples chosen at random, where it broke none: with 95% "
            f"confidence it would break at most {self.bound:.1%} of the {self.left} others"
        )


@dataclass(frozen=True)
class AttackRun:
    """One attack of an evaluation: what it did and what it cost.

    ``unstable`` counts successes that were gone when measured again in a batch of another size;
    ``forwards`` and ``backwards`` are samples sent through the model. An attack that did not run
    says why in ``skipped``.
    """

    name: str
    attempted: int = 0
    broken: int = 0
    unstable: int = 0
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    audit: Audit | None = None
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        audit = self.audit
        about = None if audit is None else {**dataclasses.asdict(audit), "bound": audit.bound}
        return {**dataclasses.asdict(self), "audit": about}


@dataclass(frozen=True, eq=False)
class Report:
    """The two-sided answer about one model under one threat.

    Classifiers: shares of samples that are right (``clean``), right and unbroken by every
    attack (``attacked``), right and proven so (``certified``); certified ≤ true ≤ attacked.
    Regressors: mean squared error, clean, worst found, and certified; attacked ≤ true ≤
    certified. ``certified`` is None where no certificate applies, and ``certificate["reason"]``
    says why.
    """

    model: str
    data: str
    task: str
    threat: dict[str, Any]
    clean: Estimate
    attacked: Estimate
    certified: Estimate | None
    certificate: dict[str, Any]
    samples: tuple[Sample, ...]
    attacks: tuple[AttackRun, ...]
    verdict: dict[str, Any]
    notes: tuple[str, ...]
    seed: int
    environment: dict[str, Any]
    x: np.ndarray = field(repr=False)
    x_adv: np.ndarray = field(repr=False)
    predictions: np.ndarray = field(repr=False)
    classes: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return one evaluation of the report's document: plain data, ready for JSON."""
        return {
            "model": self.model,
            "data": self.data,
            "task": self.task,
            "threat": self.threat,
            "seed": self.seed,
            "clean": dataclasses.asdict(self.clean),
            "attacked": dataclasses.asdict(self.attacked),
            "certified": None if self.certified is None else dataclasses.asdict(self.certified),
            "certificate": self.certificate,
            "attacks": [run.to_dict() for run in self.attacks],
            "verdict": self.verdict,
            "notes": list(self.notes),
            "curve": self._curve(),
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "examples": self._examples(),
            "classes": None if self.classes is None else list(self.classes),
            "feature_names": None if self.feature_names is None else list(self.feature_names),
        }

    def save(self, folder: str | Path, *, command: str | None = None) -> Path:
        """Write report.html, report.json, samples.csv and adversarial.npz into ``folder``."""
        return save([self], folder, command=command)

    def __str__(self) -> str:
        parts = [f"clean {self.clean}", f"attacked {self.attacked}"]
        if self.certified is not None:
            parts.append(f"certified {self.certified}")
        lines = [f"{self.model} on {self.data}, {self.threat['text']}", *parts]
        lines.append(f"verdict: {self.verdict['text']}".replace("\n", "\n  "))
        lines += [f"{run.name}: {run.audit}" for run in self.attacks if run.audit is not None]
        if self.certified is None:
            lines.append(f"no certificate: {self.certificate['reason']}")
        return "\n  ".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _curve(self) -> dict[str, Any] | None:
        """Both bounds on accuracy against ε, from the distances and radii of the samples.

        Beyond the ε of the threat no attack searched, and the upper one is None.
        """
        eps = self.threat["eps"]
        if self.task != "classification" or isinstance(eps, list) or eps == 0:
            return None
        grid = np.linspace(0, 1.5, CURVE_POINTS) * eps
        right = np.array([s.clean_correct for s in self.samples])
        found = np.array([math.inf if s.distance is None else s.distance for s in self.samples])
        curve: dict[str, Any] = {
            "eps": grid.tolist(),
            "attacked": [float((right & ~(found <= e)).mean()) if e <= eps else None for e in grid],
            "certified": None,
        }
        if self.certified is not None:
            safe = np.array([s.radius or 0.0 for s in self.samples])
            curve["certified"] = [float((right & (safe > e)).mean()) for e in grid]
        return curve

    def _examples(self) -> list[dict[str, Any]]:
        """Return the samples that took the least to break (or whose loss grew most)."""
        if self.task == "classification":
            broken = [s for s in self.samples if s.broken_by is not None]
            worst = sorted(broken, key=lambda s: s.distance or 0.0)[:EXAMPLES]
        else:
            grown = sorted(
                self.samples, key=lambda s: (s.clean_loss or 0.0) - (s.attacked_loss or 0.0)
            )
            worst = grown[:EXAMPLES]
        at = {sample.index: row for row, sample in enumerate(self.samples)}
        return [
            {
                "index": s.index,
                "label": s.label,
                "prediction": self.predictions[at[s.index]].item(),
                "distance": s.distance,
                "broken_by": s.broken_by,
                "x": self.x[at[s.index]].tolist(),
                "x_adv": self.x_adv[at[s.index]].tolist(),
            }
            for s in worst
        ]


def document(reports: Sequence[Report], *, command: str | None = None) -> dict[str, Any]:
    """Return several evaluations as the document of one report: plain data, ready for JSON."""
    whole = {
        "schema": rendering.SCHEMA,
        "robustlearn": robustlearn.__version__,
        "command": command,
        "environment": reports[0].environment,
        "evaluations": [report.to_dict() for report in reports],
    }
    return dict(rendering.plain(whole))


def save(reports: Sequence[Report], folder: str | Path, *, command: str | None = None) -> Path:
    """Write several evaluations as one report, from the first process; see `Report.save`."""
    if not first():
        return Path(folder)
    arrays = {}
    for number, report in enumerate(reports):
        broken = [row for row, s in enumerate(report.samples) if s.broken_by is not None]
        suffix = "" if len(reports) == 1 else f"_{number}"
        arrays[f"index{suffix}"] = np.array([report.samples[row].index for row in broken], int)
        arrays[f"x_adv{suffix}"] = report.x_adv[broken]
    return rendering.write(document(reports, command=command), arrays, Path(folder))
