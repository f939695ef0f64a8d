"""Certificates of networks: intervals, CROWN, α-CROWN, and branch and bound within a budget."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.certify.base import CERTIFICATES, Certificate, interval, rows
from robustlearn.certify.bounds import (
    NEVER,
    Deadline,
    crown_bounds,
    interval_bounds,
    margin_rows,
    open_neurons,
    row_bounds,
)
from robustlearn.certify.complete import RAISED, REFINED, Property, Verdict, decide
from robustlearn.certify.relax import Region, Span_of
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.models.graph import Network
from robustlearn.threats import LpBall

TOGETHER = 16  # samples that are bounded at once
DOUBLE = 3  # passes in float32 that one in float64 costs
RELATIVE = 6  # passes of a certificate that `evaluate` pays for one of its attacks
SHARES = (1.0, 0.5, 1.0)  # of the way to the boundary, where the model is compared with its record
ROOM = 10  # times the largest or expected difference, which a margin must exceed
BOTH = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # of a regressor's prediction
AGREES = 1e-3  # largest difference, in units of the outputs, that rounding explains
Spans = Callable[[Network, Region, Deadline], Span_of]


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    try:
        model.recorded(x)
    except InputError:
        return False
    return threat.p > 0


def _bounded(model: Model, threat: LpBall, x: Tensor) -> bool:
    return model.task == "classification" and _applies(model, threat, x)


class _Samples:
    """Samples of a model as it was recorded, and what is proven of them.

    Attributes
    ----------
    least : lower bounds of all margins (n, K − 1), or of ± the prediction (n, 2), from which
        ``slack`` (n,) is still to be taken.
    label : (n,) classes that must hold; None for a regressor.
    """

    def __init__(self, model: Model, x: Tensor, threat: LpBall, y: Tensor | None) -> None:
        self.network, self.slack = recorded(model, x, threat)
        self.x, self.threat = x.detach().cpu().double(), threat
        self.output = torch.cat([self.network(part) for part in self.x.split(TOGETHER)])
        self.y = None if y is None else y.detach().cpu()
        self.label = None
        if model.task != "regression":
            self.label = self.output.argmax(1) if self.y is None else self.y.long()
        count = 2 if self.label is None else self.output.shape[1] - 1
        self.least = self.output.new_full((len(x), count), -torch.inf)

    def bound(
        self, spans: Spans, steps: int = 0, end: Deadline = NEVER, chosen: Tensor | None = None
    ) -> None:
        """Bound the margins of those that are chosen, or of all, some at a time."""
        chosen = torch.arange(len(self.x)) if chosen is None else chosen
        parts = chosen.split(TOGETHER) if len(chosen) else ()
        with torch.no_grad():
            for done, part in enumerate(parts):
                found = self._found(part, spans, steps, end.share(len(parts) - done))
                self.least[part] = torch.maximum(self.least[part], found)

    def _found(self, part: Tensor, spans: Spans, steps: int, end: Deadline) -> Tensor:
        region, network = self.region(part), self.network
        wanted = BOTH.expand(len(part), 2, 1)
        if self.label is not None:
            wanted = margin_rows(self.label[part], self.output.shape[1])
        owner = torch.arange(len(part)).repeat_interleave(wanted.shape[1])
        least = row_bounds(
            network, region, network.output, wanted.flatten(0, 1)[:, None], owner,
            spans(network, region, end), steps=steps, deadline=end,
        )  # fmt: skip
        return least.reshape(len(part), -1)

    def effort(self) -> Tensor:
        """About how many passes of a sample in float32 the backward passes of CROWN cost, (n,).

        A row goes back from each neuron that intervals leave open, through all numbers before it.
        """
        found, network = [], self.network
        for part in torch.arange(len(self.x)).split(TOGETHER):
            with torch.no_grad():
                spans = interval_bounds(network, self.region(part))
            total, cost = 0, torch.zeros(len(part), dtype=torch.float64)
            for i, node in enumerate(network.nodes):
                total += 0 if node.kind == "constant" else math.prod(node.shape)
                if i in network.activations and network.segments[i].sources != (0,):
                    cost += total * open_neurons(network, i, spans[i]).sum(1)
            found.append(DOUBLE * cost / total)
        return torch.cat(found)

    def decided(self, i: int, dtype: torch.dtype, deadline: Deadline) -> Verdict:
        """Decide one sample."""
        label = int(torch.as_tensor(self.label)[i])
        rule = Property.of_class(label, self.output.shape[1])
        region, slack = self.region(torch.tensor([i])), float(self.slack[i])
        with torch.no_grad():
            return decide(self.network, region, rule, slack=slack, dtype=dtype, deadline=deadline)

    def region(self, part: Tensor) -> Region:
        """Return what some samples may become."""
        return Region(self.x[part], self.threat.select(part))

    @property
    def margin(self) -> Tensor:
        """Lower bounds of the margins of the model, as it runs, (n,)."""
        return self.least.amin(1) - self.slack

    @property
    def wrong(self) -> Tensor:
        """Which samples are not of their class as they are."""
        if self.label is None:
            return torch.zeros(len(self.x), dtype=torch.bool)
        return self.output.argmax(1) != self.label

    @property
    def status(self) -> np.ndarray:
        """What bounds and predictions say of each."""
        proven, wrong = rows(self.margin > 0), rows(self.wrong)
        return np.where(proven, "certified", np.where(wrong, "falsified", "open"))

    def stated(self, name: str, **found: Any) -> Certificate:
        """Return the certificate; what is found otherwise than by bounds replaces theirs."""
        if self.label is None:
            low, high = self.least.T
            return interval(name, low - self.slack, self.slack - high, self.y)
        facts: dict[str, Any] = {"margin": rows(self.margin), "status": self.status, **found}
        certified = facts["status"] == "certified"
        eps = torch.as_tensor(self.threat.eps, dtype=torch.float64).expand(len(self.x)).numpy()
        radius = np.where(certified, eps, 0.0)
        return Certificate(name, exact=False, radius=radius, certified=certified, **facts)


def _clock(seconds: float, x: Tensor) -> Deadline:
    """Start the clock of some samples."""
    import torch._dynamo  # noqa: F401  as torch does at its first backward pass, in seconds

    return Deadline.after(seconds * len(x))


def _within(model: Model, x: Tensor, threat: LpBall, y: Tensor | None, passes: int) -> Certificate:
    """Bound all samples by intervals, and by CROWN those for which it costs few enough passes."""
    samples = _Samples(model, x, threat, y)
    samples.bound(_ibp)
    settled = samples.wrong if samples.label is None else samples.wrong | (samples.margin > 0)
    affordable = samples.effort() <= RELATIVE * passes
    chosen = (affordable & ~settled).nonzero().squeeze(1)
    samples.bound(_crown, chosen=chosen)
    return samples.stated("crown")


@CERTIFICATES.register("complete", applies=_bounded, within=_within)
def complete(
    model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
) -> Certificate:
    """Attack, CROWN, α-CROWN and branch and bound, until each sample is decided or time is up.

    What a sample leaves of its seconds is there for the others. Complete for ReLU networks;
    tanh and sigmoid are bounded, not split.
    """
    if model.task == "regression":
        raise InputError("complete decides classes: bound a regressor by alpha_crown")
    end, samples = _clock(seconds, x), _Samples(model, x, threat, y)
    samples.bound(_ibp)
    status, margin = samples.status, rows(samples.margin)
    by = np.where(status == "certified", "crown_ibp", "prediction").astype(object)
    witness = torch.where(_tensor.per_sample(samples.wrong, samples.x) > 0, samples.x, torch.nan)
    undecided = np.flatnonzero(status == "open").tolist()
    for done, i in enumerate(undecided):
        found = samples.decided(i, model.dtype, end.share(len(undecided) - done))
        status[i], by[i], margin[i] = found.status, found.by, found.bound - float(samples.slack[i])
        if found.witness is not None:
            witness[i] = found.witness
    return samples.stated("complete", margin=margin, status=status, by=by, witness=rows(witness))


def _register(name: str, spans: Spans, steps: int, summary: str) -> None:
    def method(
        model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
    ) -> Certificate:
        end, samples = _clock(seconds, x), _Samples(model, x, threat, y)
        samples.bound(spans, steps, end)
        return samples.stated(name)

    method.__doc__ = summary
    CERTIFICATES.register(name, applies=_applies, within=_within)(method)


def recorded(model: Model, x: Tensor, threat: LpBall) -> tuple[Network, Tensor]:
    """Return the network, and by how much its margins must exceed 0 (n,).

    The bounds are those of real arithmetic, in float64. That of the model differs; by how much is
    judged, not proven: ten times the largest difference of outputs at each x and at members of the
    threat, or what a probabilistic analysis of rounding expects of any member (see
    `Network.rounding`), whichever is larger.

    Raises
    ------
    InputError for what cannot be recorded, and for a model that computes something else than
    was recorded of it.
    """
    network = model.recorded(x)
    if threat.p == 0:
        raise InputError("networks are bounded over convex sets: choose p ≥ 1")
    wide = x.detach().cpu().double()
    lows, highs = (side[:, None].split(TOGETHER) for side in threat.span(wide))
    with torch.no_grad():
        apart = torch.cat(
            [network.rounding(a, b, network.unit) for a, b in zip(lows, highs, strict=True)]
        )
        for point in _looks(x.detach().cpu(), threat):
            parts = point.split(TOGETHER // 2)
            ours = torch.cat([network(part.double()) for part in parts])
            # in batches of twice the size, so that what mixes their samples shows
            doubled = [model(torch.cat([part, part + 1]).to(model.device)) for part in parts]
            found = [both[: len(part)].cpu() for both, part in zip(doubled, parts, strict=True)]
            theirs = torch.cat(found).double().reshape(ours.shape)
            apart = torch.maximum(apart, (ours - theirs).abs().amax(1))
            size = 1 + ours.abs().amax(1)
            if not bool(((ours - theirs).abs().amax(1) <= AGREES * size).all()):
                raise InputError(
                    f"{model.name} computes something else than what was recorded of it: does it "
                    "keep a state, depend on the other samples of a batch, or overflow?"
                )
    return network, ROOM * apart + 1e-9 * size


def _looks(x: Tensor, threat: LpBall) -> Iterator[Tensor]:
    """Yield x, and members of the threat on its boundary and half way there."""
    wide, shape = x.double(), tuple(x.shape[1:])
    yield x
    for number, share in enumerate(SHARES):
        drawn = _tensor.normal(_tensor.keys(number, x), shape, torch.float64)
        yield threat.enclose(x, wide + share * threat.argmax(drawn, wide))


def _ibp(network: Network, region: Region, end: Deadline) -> Span_of:
    return interval_bounds(network, region)


def _crown(network: Network, region: Region, end: Deadline) -> Span_of:
    return crown_bounds(network, region, deadline=end)


_register(
    "alpha_crown",
    lambda network, region, end: crown_bounds(network, region, steps=REFINED, deadline=end),
    RAISED,
    "CROWN with the slopes below each ReLU optimised, for each neuron and each margin.",
)
_register(
    "crown",
    _crown,
    0,
    "Linear bounds carried backward through the network (Zhang et al., 2018).",
)
_register(
    "ibp",
    _ibp,
    0,
    "Intervals of what enters each activation, and one backward pass from the outputs.",
)
