"""Bounds on the outputs of networks: intervals, CROWN and α-CROWN, each inside the one before."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlearn.certify.relax import Region, Span, Span_of, backward, lines
from robustlearn.models.graph import Network

WORK = 2**18  # numbers in a working array: some of them fit into a cache
ALONE = 8  # samples that would fill one: from there each is looked at by itself
STEPS, RATE = 20, 0.25  # of the ascent in the slopes; they live in [0, 1]


@dataclass(frozen=True)
class Deadline:
    """A moment after which bounds are left as good as they are."""

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Return the moment so many seconds from now."""
        return cls(time.perf_counter() + seconds)

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.left <= 0

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.end - time.perf_counter()

    def share(self, parts: float) -> "Deadline":
        """Return the moment at which one of so many parts of what is left is over."""
        return Deadline.after(self.left / parts)


NEVER = Deadline()


def interval_bounds(network: Network, region: Region, known: Span_of | None = None) -> Span_of:
    """Intervals of what enters each activation, and of the outputs (n, 1, K).

    W·z ∈ W·c ± |W|·r, operation by operation; an activation keeps the order of the ends. Where the
    threat is not a box, what enters the first activations comes from its support function: for
    one layer ε‖w‖_q.
    """
    low, high = region.box
    known = dict(known or {})
    if not region.is_box:
        spans = network.intervals(low, high, known)
        for i in [i for i in network.activations if network.segments[i].sources == (0,)]:
            if i not in known:
                known[i] = _refined(network, region, i, spans, spans[i], NEVER, 0)
    return network.intervals(low, high, known)


def crown_bounds(
    network: Network, region: Region, *, steps: int = 0, deadline: Deadline = NEVER
) -> Span_of:
    """Intervals of what enters each activation, by CROWN from the input, layer after layer.

    Only for neurons whose sign is open is there anything to gain. ``steps`` of ascent in the
    slopes make it α-CROWN; neurons that the deadline leaves out keep their intervals.
    """
    known: Span_of = {}
    spans = interval_bounds(network, region)
    for i in network.activations:
        exact = region.is_box and network.segments[i].simple
        if network.segments[i].sources == (0,):
            known[i] = spans[i] if exact or not region.is_box else _refined(
                network, region, i, spans, spans[i], deadline, 0
            )  # fmt: skip
            continue
        known[i] = _refined(network, region, i, spans, spans[i], deadline, steps)
        spans = network.intervals(*region.box, known)
    return {**known, network.output: spans[network.output]}


def open_neurons(network: Network, i: int, span: Span) -> Tensor:
    """Return which neurons of an activation a tighter bound would serve, (n, neurons)."""
    low, high = (side.flatten(1) for side in span)
    return (low < 0) & (high > 0) if network.nodes[i].kind == "relu" else high > low


def _refined(
    network: Network, region: Region, i: int, spans: Span_of, span: Span, deadline: Deadline,
    steps: int,
) -> Span:  # fmt: skip
    """Bound the neurons of an activation from both sides by rows ±e_j, some at a time."""
    shape = span[0].shape
    low, high = (side.flatten(1).clone() for side in span)
    open_ = open_neurons(network, i, span)
    owners, places = open_.nonzero().unbind(1)
    for mine, at in _chunks(owners, places, max(1, WORK // (2 * network.width))):
        if deadline.passed:
            break
        rows = low.new_zeros(2, len(at), low.shape[1])
        rows[0, torch.arange(len(at)), at] = 1.0
        rows[1] = -rows[0]
        shaped = rows.reshape(2 * len(at), *shape[1:])
        owner = mine if len(mine) == 1 else torch.cat([mine, mine])
        found = _pulled(network, region, i, shaped, owner, spans, steps, deadline)
        below, above = found.chunk(2)
        low[mine, at] = torch.maximum(low[mine, at], below)
        high[mine, at] = torch.minimum(high[mine, at], -above)
    return low.reshape(shape), high.reshape(shape)


def _chunks(owner: Tensor, place: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split neurons, by sample where a sample has many: its lines then serve all its rows."""
    samples, counts = owner.unique_consecutive(return_counts=True)
    if ALONE * len(owner) < size * len(samples):
        yield from zip(owner.split(size), place.split(size), strict=True)
        return
    for sample, places in zip(samples, place.split(counts.tolist()), strict=True):
        for part in places.split(size):
            yield sample[None], part


def row_bounds(
    network: Network,
    region: Region,
    target: int,
    rows: Tensor,
    owner: Tensor,
    spans: Span_of,
    *,
    steps: int = 0,
    deadline: Deadline = NEVER,
) -> Tensor:
    """min over the region of rows·z, from below, (r,); by α-CROWN if ``steps``.

    Parameters
    ----------
    target : what z enters, or the output; rows : (r, *z).
    owner : (r,) the sample of each row, or (1,) that of all.
    spans : of the target, which hold the result too, and of the activations before.
    """
    negative = rows.clamp(max=0)
    low, high = (side.index_select(0, owner) for side in spans[target])
    floor = ((rows - negative) * low + negative * high).flatten(1).sum(1)
    floor = torch.where(floor.isfinite(), floor, -torch.inf)  # 0·∞ where a span is not known
    found = _pulled(network, region, target, rows, owner, spans, steps, deadline)
    return torch.maximum(found, floor)


def _pulled(
    network: Network, region: Region, target: int, rows: Tensor, owner: Tensor, spans: Span_of,
    steps: int, deadline: Deadline,
) -> Tensor:  # fmt: skip
    """Bound rows by what they are of the input, whatever is known of the target itself."""
    mine = region.select(owner)
    samples, sample = owner.unique(return_inverse=True)
    before = {i: (s[0][samples], s[1][samples]) for i, s in spans.items() if i < target}
    if not steps:
        relaxed = {i: line.rows(sample) for i, line in lines(network, before).items()}
        return mine.least(*backward(network, target, rows, relaxed))
    before = {i: (low[sample], high[sample]) for i, (low, high) in before.items()}
    alpha = Slopes(network, before, len(rows))
    best = rows.new_full((len(rows),), -torch.inf)
    optimizer = torch.optim.Adam(list(alpha.values.values()) or [torch.zeros(1)], lr=RATE)
    for step in range(steps + 1):
        with torch.enable_grad():
            relaxed = lines(network, before, alpha.slopes())
            bound = mine.least(*backward(network, target, rows, relaxed))
            loss = -bound.sum()
        best = torch.maximum(best, bound.detach())
        if step == steps or not loss.requires_grad or deadline.passed:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha.clip()
    return best


def margin_rows(label: Tensor, classes: int) -> Tensor:
    """Rows that give z_label − z_j of an output for all other classes j in order, (n, K − 1, K)."""
    eye = torch.eye(classes, dtype=torch.float64, device=label.device)
    every = torch.arange(classes, device=label.device).expand(len(label), classes)
    rivals = every[every != label[:, None]].reshape(len(label), classes - 1)
    return eye[label][:, None] - eye[rivals]


class Slopes:
    """Slopes under the ReLU whose signs are open in any row, one for each row.

    ``values`` are (r, open) by activation.
    """

    def __init__(self, network: Network, spans: Mapping[int, Span], rows: int) -> None:
        self.shapes, self.places, self.values = {}, {}, {}
        for i, (low, high) in spans.items():
            if network.nodes[i].kind != "relu":
                continue
            open_ = ((low < 0) & (high > 0)).flatten(1)
            places = open_.any(0).nonzero().squeeze(1)
            start = (high > -low).flatten(1)[:, places].to(low.dtype)
            self.shapes[i], self.places[i] = low.shape, places
            self.values[i] = start.expand(rows, -1).clone().requires_grad_()

    def slopes(self) -> dict[int, Tensor]:
        """Return the slopes in the shape of each activation."""
        return {
            i: spread(value, self.places[i], self.shapes[i]) for i, value in self.values.items()
        }

    def clip(self) -> None:
        """Keep them between 0 and 1, where every value is sound."""
        for value in self.values.values():
            value.data.clamp_(0, 1)


def spread(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Put (r, k) values at k places of a row of zeros."""
    size = math.prod(shape[1:])
    whole = values.new_zeros(len(values), size).index_copy(1, places, values)
    return whole.reshape(len(values), *shape[1:])
