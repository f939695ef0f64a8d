"""`diagnose`: whether the outcome of attacks on a model can be believed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.evaluate.checks import CHECKS, unsuitable
from robustlearn.evaluate.probes import LEARNED_FROM, Probes
from robustlearn.models import Model, wrap
from robustlearn.models import labels as labels_of
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
    positive where a sample is misclassified.
    """

    findings: tuple[Finding, ...]
    samples: int
    forwards: float
    backwards: float
    ascent: tuple[float, ...] = ()

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings that speak against the evaluation."""
        return tuple(finding for finding in self.findings if finding.passed is False)

    @property
    def trustworthy(self) -> bool:
        """Whether checks applied and none failed."""
        return not self.failed and any(finding.passed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {
            "trustworthy": self.trustworthy,
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
    x, y : samples (N, *shape) and labels or targets (N,). Looked at are the first ``samples`` that
        the model gets right, and a surrogate is learned from the first 1,000.
    threat : what the adversary may do; p must be 1, 2 or ∞.
    outputs : (N, K) or (N,) the model's outputs for x, if they are known.
    broken : (N,) bool by attack, the samples that it broke, in the order in which the attacks
        ran: what an evaluation found already. Labels are those of the evaluation, as
        ``"pgd:steps=40"``.
    surrogate : a model to transfer attacks from; by default one is distilled from the model.
    checks : names from `CHECKS`; by default all.
    samples : how many to look at. All of it costs at most 60 gradients and 300 outputs each.
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
    if threat.p not in (1, 2, math.inf):
        raise InputError(f"the verdict knows the norms 1, 2 and inf, not {threat.p:g}")
    wanted = list(CHECKS) if checks is None else [CHECKS[name].name for name in checks]
    model = wrap(model)
    points = threat.cast(_tensor.as_tensor(x).cpu(), model.dtype)
    targets = labels_of(model, points, y)
    before = (model.forwards, model.backwards)
    with model.session(), torch.no_grad():
        probes = _probes(model, points, targets, threat, outputs, broken, surrogate, samples, seed)
        findings = tuple(_finding(name, probes) for name in wanted)
        n = 0 if probes is None else len(probes.x)
    cost = [
        (now - then) / max(n, 1)
        for now, then in zip((model.forwards, model.backwards), before, strict=True)
    ]
    ascent: tuple[float, ...] = ()
    if probes is not None and "climbed" in vars(probes) and probes.climbed.path is not None:
        ascent = tuple(probes.climbed.path.nan_to_num(0).mean(1).tolist())
    return Verdict(findings, n, cost[0], cost[1], ascent)


def _probes(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    outputs: Tensor | None,
    broken: Mapping[str, Tensor] | None,
    surrogate: Any,
    samples: int,
    seed: int,
) -> Probes | None:
    """Choose the samples to look at; None if the model gets none right."""
    rows = torch.arange(len(x))
    if model.task == "classification":
        if outputs is None:
            some = x[: 4 * samples].to(model.device)
            outputs = torch.cat([model(part).cpu() for part in some.split(256)])
        rows = (outputs.argmax(1) == y[: len(outputs)]).nonzero().squeeze(1)
    record = {label: mask[rows] for label, mask in (broken or {}).items()}
    rows = rows[:samples]
    if len(rows) == 0:
        return None
    keys = _tensor.fold(torch.full((len(rows),), seed, dtype=torch.int64), rows)
    return Probes(
        model,
        x[rows].to(model.device),
        y[rows].to(model.device),
        threat.select(rows),
        pool=x[:LEARNED_FROM].to(model.device),
        keys=keys.to(model.device),
        record=record,
        surrogate=surrogate,
    )


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
