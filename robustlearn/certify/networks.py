"""Certificates of networks: intervals, CROWN, α-CROWN, and branch and bound within a budget."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from robustlearn._tensor import per_sample
from robustlearn.certify.base import CERTIFICATES, Certificate, rows
from robustlearn.certify.bounds import (
    Deadline,
    crown_bounds,
    interval_bounds,
    margin_rows,
    row_bounds,
)
from robustlearn.certify.complete import RAISED, REFINED, Property, decide
from robustlearn.certify.relax import Region, Span_of
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.models.trace import Network
from robustlearn.threats import LpBall

TOGETHER = 16  # samples that are bounded at once
LOOKS = 4  # members of a threat at which the model is compared with what was recorded of it
ROOM = 10  # times the largest difference, which a margin must exceed
BOTH = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # of a regressor's prediction
DOUBLE = 3  # passes in float32 that one in float64 costs
AGREES = 1e-3  # largest difference, in units of the outputs, that rounding explains


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    try:
        model.recorded(x)
    except InputError:
        return False
    return threat.p > 0


def _bounded(model: Model, threat: LpBall, x: Tensor) -> bool:
    return model.task == "classification" and _applies(model, threat, x)


def _effort(network: Network) -> float:
    """About how many passes of a sample in float32 the backward passes of CROWN cost."""
    total, cost = 0, 0
    for i, node in enumerate(network.nodes):
        if node.kind != "constant":
            total += math.prod(node.shape)
        if i in network.activations and network.segments[i].sources != (0,):
            cost += math.prod(node.shape) * total
    return DOUBLE * cost / total


def _within(model: Model, x: Tensor, threat: LpBall, y: Tensor | None, passes: int) -> Certificate:
    """Bound all samples by intervals, and by CROWN those that promise most."""
    network, slack = recorded(model, x, threat)
    wide = x.detach().cpu().double()
    output = network(wide)
    label = _labels(model, output, y)
    with torch.no_grad():
        least = _bounds(network, wide, threat, label, lambda part: interval_bounds(network, part))
        margin, proven, wrong = _judged(least, slack, output, label)
        promise = margin.masked_fill(proven | wrong, -torch.inf)
        order = promise.argsort(descending=True, stable=True)[: int((~(proven | wrong)).sum())]
        chosen = order[: int(passes / max(1.0, _effort(network)))]
        if len(chosen):
            least[chosen] = _bounds(
                network, wide[chosen], threat.select(chosen), None if label is None else
                label[chosen], lambda part: crown_bounds(network, part)
            )  # fmt: skip
    return _stated("crown", least, slack, output, label, y, threat)


@CERTIFICATES.register("complete", applies=_bounded, within=_within)
def complete(
    model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
) -> Certificate:
    """Attack, CROWN, α-CROWN and branch and bound, until each sample is decided or time is up.

    What a sample leaves of its seconds is there for the others. Complete for ReLU networks;
    tanh and sigmoid are bounded, not split.
    """
    network, slack = recorded(model, x, threat)
    if model.task == "regression":
        raise InputError("complete decides classes: bound a regressor by alpha_crown")
    wide, end = x.detach().cpu().double(), Deadline.after(seconds * len(x))
    output = network(wide)
    label = output.argmax(1) if y is None else y.detach().cpu().long()
    with torch.no_grad():
        least = _bounds(
            network, wide, threat, label, lambda region: interval_bounds(network, region)
        )
    margin = rows(least.amin(1).nan_to_num(nan=-torch.inf))
    wrong = rows(output.argmax(1) != label)
    status = np.where(margin > rows(slack), "certified", np.where(wrong, "falsified", "open"))
    by = np.where(wrong, "prediction", np.where(status == "open", "", "crown_ibp")).astype(object)
    witness = torch.where(per_sample(torch.from_numpy(wrong), wide) > 0, wide, torch.nan)
    undecided = np.flatnonzero(status == "open").tolist()
    for done, i in enumerate(undecided):
        region = Region(wide[i : i + 1], threat.select(torch.tensor([i])))
        rule = Property.of_class(int(label[i]), output.shape[1])
        with torch.no_grad():
            found = decide(
                network,
                region,
                rule,
                slack=float(slack[i]),
                dtype=model.dtype,
                deadline=Deadline.after(end.left / (len(undecided) - done)),
            )
        status[i], by[i], margin[i] = found.status, found.by, found.bound
        if found.witness is not None:
            witness[i] = found.witness
    proven = status == "certified"
    return Certificate(
        "complete",
        exact=False,
        radius=np.where(proven, _eps(threat, len(x)), 0.0),
        certified=proven,
        margin=margin,
        status=status,
        by=by,
        witness=rows(witness),
    )


def _register(
    name: str, spans: Callable[[Network, Region, Deadline], Span_of], steps: int, summary: str
) -> None:
    def method(
        model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
    ) -> Certificate:
        network, slack = recorded(model, x, threat)
        wide, end = x.detach().cpu().double(), Deadline.after(seconds * len(x))
        output = network(wide)
        label = _labels(model, output, y)
        with torch.no_grad():
            least = _bounds(
                network, wide, threat, label, lambda region: spans(network, region, end), steps
            )
        return _stated(name, least, slack, output, label, y, threat)

    method.__doc__ = summary
    CERTIFICATES.register(name, applies=_applies, within=_within)(method)


def _labels(model: Model, output: Tensor, y: Tensor | None) -> Tensor | None:
    """Return the classes that must hold; None for a regressor."""
    if model.task == "regression":
        return None
    return output.argmax(1) if y is None else y.detach().cpu().long()


def _judged(
    least: Tensor, slack: Tensor, output: Tensor, label: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least margin (n,), and which samples are proven, and wrong as they are."""
    margin = least.amin(1).nan_to_num(nan=-torch.inf)
    nothing = torch.zeros(len(least), dtype=torch.bool)
    if label is None:
        return margin, nothing, nothing
    return margin, margin > slack, output.argmax(1) != label


def _stated(
    name: str, least: Tensor, slack: Tensor, output: Tensor, label: Tensor | None,
    y: Tensor | None, threat: LpBall,
) -> Certificate:  # fmt: skip
    if label is None:
        return _interval(name, least, slack, y)
    margin, proven, wrong = _judged(least, slack, output, label)
    return Certificate(
        name,
        exact=False,
        radius=np.where(proven, _eps(threat, len(least)), 0.0),
        certified=rows(proven),
        margin=rows(margin),
        status=np.where(proven, "certified", np.where(wrong, "falsified", "open")),
    )


def _bounds(
    network: Network,
    x: Tensor,
    threat: LpBall,
    label: Tensor | None,
    spans: Callable[[Region], Span_of],
    steps: int = 0,
) -> Tensor:
    """Lower bounds of all margins (n, K − 1), or of ± the prediction (n, 2), some at a time."""
    classes, found = network.nodes[network.output].shape[-1], []
    for at in torch.arange(len(x)).split(TOGETHER):
        region = Region(x[at], threat.select(at))
        wanted = BOTH.expand(len(at), 2, 1) if label is None else margin_rows(label[at], classes)
        owner = torch.arange(len(at)).repeat_interleave(wanted.shape[1])
        flat = wanted.flatten(0, 1)[:, None]
        least = row_bounds(network, region, network.output, flat, owner, spans(region), steps=steps)
        found.append(least.reshape(len(at), -1))
    return torch.cat(found)


def recorded(model: Model, x: Tensor, threat: LpBall) -> tuple[Network, Tensor]:
    """Return the network, and by how much its margins must exceed 0 (n,).

    The bounds are those of real arithmetic, in float64. That of the model differs; by how much is
    measured, not proven: ten times the largest difference of its outputs at each x and at random
    members of the threat.

    Raises
    ------
    InputError for what cannot be recorded, and for a model that computes something else than
    was recorded of it.
    """
    network = model.recorded(x)
    if threat.p == 0:
        raise InputError("networks are bounded over convex sets: choose p ≥ 1")
    generator = torch.Generator().manual_seed(0)
    apart = torch.zeros(len(x), dtype=torch.float64)
    for look in range(LOOKS):
        point = x.cpu()
        if look:
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            wide = point.double()
            point = threat.enclose(point, wide + threat.argmax(drawn, wide))
        with torch.no_grad():
            parts = [model(part.to(model.device)).cpu() for part in point.split(TOGETHER)]
            theirs = torch.cat(parts).double().reshape(len(x), -1)
            ours = network(point.double())
        apart = torch.maximum(apart, (ours - theirs).abs().amax(1))
        if bool((apart > AGREES * (1 + ours.abs().amax(1))).any()):
            raise InputError(
                f"{model.name} computes something else than what was recorded of it: does it keep "
                "a state, or depend on the other samples of a batch?"
            )
    return network, ROOM * apart + 1e-9 * (1 + ours.abs().amax(1))


def certified_radius(
    model: Model,
    x: Tensor,
    threat: LpBall,
    *,
    y: Tensor | None = None,
    method: str = "auto",
    seconds: float = 1.0,
    halvings: int = 8,
) -> np.ndarray:
    """Return the largest budget, up to that of the threat, at which each sample is certified (n,).

    By bisection between 0 and ε, in ``halvings`` runs of a method; below the truth by its gap and
    ε·2^−halvings at most.
    """
    from dataclasses import replace

    from robustlearn.certify.base import certify

    eps = torch.as_tensor(threat.eps, dtype=torch.float64).expand(len(x)).clone()

    def holds(budget: Tensor) -> Tensor:
        found = certify(
            model, x, replace(threat, eps=budget), y=y, method=method, seconds=seconds / halvings
        )
        return torch.from_numpy(np.asarray(found.certified, dtype=bool))

    low = torch.where(holds(eps), eps, 0.0)
    high = eps
    for _ in range(halvings):
        middle = (low + high) / 2
        safe = holds(middle)
        low, high = torch.where(safe, middle, low), torch.where(safe, high, middle)
    return low.numpy()


def _interval(name: str, least: Tensor, slack: Tensor, y: Tensor | None) -> Certificate:
    lower, upper = least[:, 0] - slack, slack - least[:, 1]
    loss = None
    if y is not None:
        target = y.detach().cpu().double()
        loss = rows(torch.maximum((upper - target).abs(), (lower - target).abs()) ** 2)
    return Certificate(name, exact=False, lower=rows(lower), upper=rows(upper), loss=loss)


def _eps(threat: LpBall, n: int) -> np.ndarray:
    return torch.as_tensor(threat.eps, dtype=torch.float64).expand(n).numpy()


_register(
    "alpha_crown",
    lambda network, region, end: crown_bounds(network, region, steps=REFINED, deadline=end),
    RAISED,
    "CROWN with the slopes below each ReLU optimised, for each neuron and each margin.",
)
_register(
    "crown",
    lambda network, region, end: crown_bounds(network, region, deadline=end),
    0,
    "Linear bounds carried backward through the network (Zhang et al., 2018).",
)
_register(
    "ibp",
    lambda network, region, end: interval_bounds(network, region),
    0,
    "Intervals of what enters each activation, and one backward pass from the outputs.",
)
