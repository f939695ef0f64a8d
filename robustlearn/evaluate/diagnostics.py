"""`diagnose`: whether the outcome of attacks on a model can be believed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn.evaluate import draws
from robustlearn.evaluate.checks import CHECKS, unsuitable
from robustlearn.evaluate.probes import LEARNED_FROM, NORMS, Probes
from robustlearn.models import labels as labels_of
from robustlearn.models import wrap
from robustlearn.threats import LpBall


@dataclass(frozen=True)
class Finding:
    """What one check found.

    ``passed`` is None where it did not apply, and ``reason`` says why. ``evidence`` holds the
    numbers behind it, and ``remedy`` what to do where it failed.
    """

    check: str
    passed: bool | None
    reason: str
    evidence: dict[str, float]
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """The findings on a model, and what they were had at: samples, and cost a sample.

    ``ascent`` is the mean objective along the projected gradient ascent that was looked at;
    positive where a sample is misclassified. ``lacking`` says what keeps checks that found
    nothing from being a reason for trust.
    """

    findings: tuple[Finding, ...]
    samples: int
    forwards: float
    backwards: float
    ascent: tuple[float, ...] = ()
    lacking: str = ""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that speak against the evaluation."""
        return tuple(finding for finding in self.findings if finding.passed is False)

    @property
    def trustworthy(self) -> bool:
        """Whether checks applied, none failed, and nothing was lacking."""
        applied = any(finding.passed for finding in self.findings)
        return applied and not self.failed and not self.lacking

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON; ``trustworthy`` is None where there is no verdict."""
        return {
            "trustworthy": True if self.trustworthy else False if self.failed else None,
            "samples": self.samples,
            "forwards": self.forwards,
            "backwards": self.backwards,
            "ascent": list(self.ascent),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        counted = sum(finding.passed is not None for finding in self.findings)
        where = f"{counted} checks on {self.samples} samples"
        if self.trustworthy:
            return f"trustworthy: {where} found nothing"
        if not self.failed and self.lacking:
            return f"no verdict: {self.lacking} ({where} found nothing)"
        if not self.failed:
            return "no verdict: " + "; ".join(dict.fromkeys(f.reason for f in self.findings))
        lines = [f"suspicious ({len(self.failed)} of {where}):"]
        lines += [f"  because {f.reason} → {f.remedy}" for f in self.failed]
        return "\n".join(lines)


def diagnose(
    model: Any,
    x: Any,
    y: Any,
    threat: LpBall,
    *,
    outputs: Tensor | None = None,
    broken: Mapping[str, Tensor] | None = None,
    surrogate: Any = None,
    checks: Sequence[str] | None = None,
    samples: int = 64,
    seed: int = 0,
) -> Verdict:
    """Say whether attacks on the model can be believed: trustworthy, or suspicious because ….

    A robust accuracy is an upper bound that is only as good as its attacks. The checks look for
    the known ways in which these fail: gradients that are masked, outputs that are random,
    optimisation that does not end, and attacks that lose to weaker ones.

    Parameters
    ----------
    model : a `Model`, or anything that `robustlearn.wrap` takes. Of a black box only what its
        scores tell is checked; of a regressor what does not speak of classes.
    x, y : samples (N, *shape) and labels or targets (N,). Looked at are ``samples`` random ones
        that the model gets right, and a surrogate is learned from 1,000 random ones.
    threat : what the adversary may do. Where p is not 1, 2 or ∞, the checks that need no norm
        are made, which find faults but are no reason for trust.
    outputs : (N, K) or (N,) the model's outputs for x, if they are known.
    broken : (N,) bool by attack, the samples that it broke, in the order in which the attacks
        ran: what an evaluation found already. Labels are those of the evaluation, as
        ``"pgd:steps=40"``. An empty mapping is an evaluation that ran no attack.
    surrogate : a model to transfer attacks from; by default one is distilled from the model.
    checks : names from `CHECKS`; by default all.
    samples : how many to look at. All of it costs at most 60 gradients and 300 outputs each, and
        what it takes to find so many that the model gets right.
    seed : of everything random.

    Returns
    -------
    A `Verdict`, whose findings are one for each check.

    Notes
    -----
    Source: Carlini et al. (2019), On Evaluating Adversarial Robustness; Croce and Hein (2020),
    for the flags of AutoAttack; Pintor et al. (2022), Indicators of Attack Failure. Thresholds
    are in `checks.base`; benchmarks/diagnostics.py measures detections and false alarms.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> sound = torch.nn.Linear(4, 3)
    >>> x = torch.rand(64, 4)
    >>> y = sound(x).argmax(1)
    >>> diagnose(sound, x, y, LpBall(math.inf, 0.01)).trustworthy
    True
    >>> class Rounded(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward((64 * x).round() / 64)
    >>> rounded = Rounded(4, 3)
    >>> _ = rounded.load_state_dict(sound.state_dict())
    >>> diagnose(rounded, x, y, LpBall(math.inf, 0.01)).failed[0].check
    'gradient_available'
    """
    diagnosis = Diagnosis(
        model, x, y, threat, outputs=outputs, surrogate=surrogate, samples=samples, seed=seed
    )
    return diagnosis.verdict(broken, checks)


class Diagnosis:
    """The probes of a model, made once, and verdicts as attacks go on.

    Parameters
    ----------
    model, x, y, threat, outputs, surrogate, samples, seed : as for `diagnose`.
    numbers : (N,) of the samples in their data set; by default 0 … N−1. Which of them are looked
        at depends on their numbers and the seed alone.
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any,
        threat: LpBall,
        *,
        outputs: Tensor | None = None,
        surrogate: Any = None,
        samples: int = 64,
        seed: int = 0,
        numbers: Tensor | None = None,
    ) -> None:
        self.model, self.threat = wrap(model), threat
        self.outputs, self.surrogate = outputs, surrogate
        self.samples, self.seed = samples, seed
        self.x = threat.cast(_tensor.as_tensor(x).cpu(), self.model.dtype)
        self.y = labels_of(self.model, self.x, y)
        self.numbers = torch.arange(len(self.x)) if numbers is None else numbers
        self.order = draws.shuffled(seed, self.numbers, use=1)
        self.forwards = self.backwards = 0
        self._rows: Tensor | None = None
        self._probes: Probes | None = None
        self._lasting: dict[str, Finding] = {}

    def verdict(
        self, broken: Mapping[str, Tensor] | None = None, checks: Sequence[str] | None = None
    ) -> Verdict:
        """Return the findings; only those that look at what attacks broke are made anew.

        Parameters
        ----------
        broken, checks : as for `diagnose`; an empty record is that of an evaluation that ran no
            attack, so that everything stands.
        """
        wanted = list(CHECKS) if checks is None else [CHECKS[name].name for name in checks]
        before = (self.model.forwards, self.model.backwards)
        with self.model.session(), torch.no_grad():
            if self._rows is None:
                self._rows = self._right()
                self._probes = self._probed(self._rows[: self.samples])
            if self._probes is not None and broken is not None:
                self._probes.record = {label: mask[self._rows] for label, mask in broken.items()}
            findings = tuple(self._found(name) for name in wanted)
        self.forwards += self.model.forwards - before[0]
        self.backwards += self.model.backwards - before[1]
        n = min(len(self._rows), self.samples)
        cost = (self.forwards / max(n, 1), self.backwards / max(n, 1))
        return Verdict(findings, n, *cost, self._ascent(), self._lacking(broken))

    def _right(self) -> Tensor:
        """Return rows that the model gets right, in random order: all that are known, or enough."""
        if self.model.task != "classification":
            return self.order
        if self.outputs is None:
            return draws.right(self.model, self.x, self.y, self.order, self.samples)
        return self.order[~losses.misclassified(self.outputs, self.y)[self.order]]

    def _probed(self, rows: Tensor) -> Probes | None:
        """Return the probes of some samples; None if there are none."""
        if len(rows) == 0:
            return None
        there = self.model.device
        return Probes(
            self.model,
            self.x[rows].to(there),
            self.y[rows].to(there),
            self.threat.select(rows),
            pool=self.x[self.order[:LEARNED_FROM]].to(there),
            keys=draws.keys(self.seed, self.numbers[rows]).to(there),
            surrogate=self.surrogate,
        )

    def _found(self, name: str) -> Finding:
        """Make a check, unless it was made and no attack can have changed it."""
        if CHECKS[name].facts["needs"] == "evaluation":
            return _finding(name, self._probes)
        if name not in self._lasting:
            self._lasting[name] = _finding(name, self._probes)
        return self._lasting[name]

    def _ascent(self) -> tuple[float, ...]:
        if self._probes is None or "climbed" not in vars(self._probes):
            return ()
        path = self._probes.climbed.path
        return () if path is None else tuple(path.nan_to_num(0).mean(1).tolist())

    def _lacking(self, broken: Mapping[str, Tensor] | None) -> str:
        """Say why nothing found is no reason for trust."""
        if self._probes is None:
            return ""
        if broken is not None and not broken:
            return "no attack ran, so that the attacked figure is only the clean one"
        p = self.threat.p
        if p not in NORMS:
            return f"the checks that compare attacks know the norms 1, 2 and inf, not {p:g}"
        return ""


def _finding(name: str, probes: Probes | None) -> Finding:
    """Make one check."""
    remedy = CHECKS[name].facts["remedy"]
    reason = "the model gets no sample right" if probes is None else unsuitable(name, probes)
    if reason is not None or probes is None:
        return Finding(name, None, str(reason), {}, remedy)
    outcome = CHECKS[name].function(probes)
    if outcome is None:
        return Finding(name, None, "there is nothing to look at", {}, remedy)
    passed, evidence, said = outcome
    finite = {key: float(v) for key, v in evidence.items() if math.isfinite(v)}
    return Finding(name, passed, said, finite, remedy)
