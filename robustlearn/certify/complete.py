"""Decide a property of a network: certified, falsified by a witness, or open when time is up.

First a short attack, then intervals, CROWN and α-CROWN, then branch and bound over the signs of
ReLU: each box is split where a look ahead promises most, its bound is raised in the slopes α and
the multipliers β of its signs, and the corner that minimises each linear bound is tried as a
counterexample (Wang et al., 2021). A box whose signs are all given is a linear program.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlearn.certify.bounds import (
    NEVER,
    Deadline,
    crown_bounds,
    interval_bounds,
    margin_rows,
    row_bounds,
    spread,
)
from robustlearn.certify.milp import SMALL, least
from robustlearn.certify.relax import Lines, Region, Span_of, backward, lines
from robustlearn.models.trace import Network

BOXES = 256  # split together, if they are narrow
NUMBERS = 2**20  # in the widest value of all boxes that are split together
STEPS = 12  # of ascent in a box
AHEAD = 4  # neurons that are tried
RATES = {"alpha": 0.1, "beta": 0.05, "weight": 0.2}
RAISED, REFINED = 20, 10  # steps of ascent for a row, for each neuron whose sign is open
SHARE = 0.3  # of the time that is left, for the latter


@dataclass(frozen=True, eq=False)
class Property:
    """What must not be: for some group, rows·y + offsets ≤ 0 in all of its rows.

    ``rows`` are (g, m, K) and ``offsets`` (g, m), padded by repeating a row.
    """

    rows: Tensor
    offsets: Tensor

    @classmethod
    def of_class(cls, label: int, classes: int) -> "Property":
        """Return that another class is at least as high as this one."""
        rows = margin_rows(torch.tensor([label]), classes)[0][:, None]
        return cls(rows, rows.new_zeros(rows.shape[:2]))

    def value(self, output: Tensor) -> Tensor:
        """Return max over the rows of a group, (n, g): ≤ 0 where the property is violated."""
        return (torch.einsum("gmk,nk->ngm", self.rows, output) + self.offsets).amax(2)

    def select(self, groups: Tensor) -> "Property":
        """Return some of its groups."""
        return Property(self.rows[groups], self.offsets[groups])


@dataclass(frozen=True, eq=False)
class Verdict:
    """What was found: ``status`` is ``"certified"``, ``"falsified"`` or ``"open"``.

    ``by`` is the step that decided, ``bound`` a lower bound on the least value of a row that must
    stay positive, ``witness`` (*shape) a point of the region in float64, ``boxes`` how many were
    split.
    """

    status: str
    by: str
    bound: float
    witness: Tensor | None = None
    boxes: int = 0


def decide(
    network: Network,
    region: Region,
    rule: Property,
    *,
    slack: float = 0.0,
    dtype: torch.dtype = torch.float64,
    deadline: Deadline = NEVER,
    generator: torch.Generator | int = 0,
) -> Verdict:
    """Decide whether a property holds all over the region of one sample.

    Parameters
    ----------
    region : of one sample in float64; rule : what must not be.
    slack : by how much rows must stay positive, for the rounding of whoever runs the network.
    dtype : that a witness must be representable in, and is attained in.
    """
    bound = torch.full((len(rule.rows),), -torch.inf, dtype=region.x.dtype)
    open_, by = torch.arange(len(rule.rows)), ""
    for by, spans, steps in _stages(network, region, deadline):
        rows = rule.rows[open_].flatten(0, 1)[:, None]
        found = row_bounds(
            network, region, network.output, rows, torch.tensor([0]), spans, steps=steps
        )
        found = (found.reshape(len(open_), -1) + rule.offsets[open_]).amax(1)
        bound[open_] = torch.maximum(bound[open_], found)
        open_ = (~(bound > slack)).nonzero().squeeze(1)
        if not len(open_):
            return Verdict("certified", by, float(bound.min()))
        if by == "crown_ibp":
            witness = falsify(network, region, rule, dtype, generator)
            if witness is not None:
                return Verdict("falsified", "attack", -torch.inf, witness)
        if deadline.passed:
            return Verdict("open", by, float(bound.min()))
    tree = _Tree(network, region, rule.select(open_), spans, slack, dtype)
    return tree.search(bound[open_], deadline)


def _stages(
    network: Network, region: Region, deadline: Deadline
) -> Iterator[tuple[str, Span_of, int]]:
    """Yield what to try, the cheapest first: a name, bounds of the activations, steps of ascent."""
    yield "crown_ibp", interval_bounds(network, region), 0
    spans = crown_bounds(network, region, deadline=deadline)
    yield "crown", spans, 0
    yield "alpha_crown", spans, RAISED
    if not network.is_shallow:
        share = Deadline.after(SHARE * deadline.left)
        yield "alpha_crown", crown_bounds(network, region, steps=REFINED, deadline=share), RAISED


def falsify(
    network: Network,
    region: Region,
    rule: Property,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | int = 0,
    *,
    steps: int = 40,
    restarts: int = 4,
) -> Tensor | None:
    """Look for a violation by the method of Frank and Wolfe from random points of the region.

    δ ← (1 − γ)δ + γ·argmax⟨−∇, ·⟩ stays in every convex threat; γ falls from 1/2.
    """
    threat, groups = region.threat, len(rule.rows)
    x = region.x.expand(groups * restarts, *region.x.shape[1:])
    target = torch.arange(groups).repeat_interleave(restarts)
    ball = threat.select(torch.zeros(len(x), dtype=torch.long))
    delta = torch.zeros_like(x)
    if not threat.convex or threat.p == 0:
        return None
    signs = torch.randn(x.shape, generator=_generator(generator), dtype=x.dtype)
    delta = ball.argmax(signs, x)
    delta[::restarts] = 0
    for step in range(steps):
        with torch.enable_grad():
            leaf = delta.requires_grad_()
            value = rule.value(network(x + leaf)).gather(1, target[:, None]).squeeze(1)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        delta = delta.detach()
        found = confirmed(network, region, rule, (x + delta)[value <= 0], dtype)
        if found is not None:
            return found
        gamma = 1 / (2 + step / 4)
        delta = (1 - gamma) * delta + gamma * ball.argmax(-slope, x)
    return confirmed(network, region, rule, x + delta, dtype)


def _generator(seed: torch.Generator | int) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(seed)


def confirmed(
    network: Network, region: Region, rule: Property, points: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return a point in the region, exactly, at which the property is violated in float64."""
    if not len(points):
        return None
    x = region.x.expand(len(points), *region.x.shape[1:])
    ball = region.threat.select(torch.zeros(len(points), dtype=torch.long))
    inside = ball.enclose(x.to(dtype), points).double()
    with torch.no_grad():
        wrong = (rule.value(network(inside)) < 0).any(1)
    wrong &= ball.contains(x, inside)
    return inside[wrong][0] if bool(wrong.any()) else None


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Boxes as rows: the group, the signs given, the start of the ascent, the bound so far."""

    group: Tensor
    signs: Tensor
    alpha: Tensor
    beta: Tensor
    bound: Tensor

    def __len__(self) -> int:
        return len(self.group)

    def take(self, index: Tensor) -> "_Boxes":
        """Return some of them."""
        return _Boxes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def join(self, other: "_Boxes") -> "_Boxes":
        """Return both."""
        names = self.__dataclass_fields__
        return _Boxes(*(torch.cat([getattr(self, n), getattr(other, n)]) for n in names))


class _Tree:
    """Branch and bound over the ReLU whose signs are open, with fixed bounds of what enters."""

    def __init__(
        self, network: Network, region: Region, rule: Property, spans: Span_of, slack: float,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.network, self.region, self.rule = network, region, rule
        self.spans, self.slack, self.dtype = spans, slack, dtype
        self.base = lines(network, spans)
        self.places: dict[int, Tensor] = {}
        self.parts: dict[int, slice] = {}
        count = 0
        for i in network.activations:
            low, high = (side.flatten() for side in spans[i])
            if network.nodes[i].kind == "relu":
                self.places[i] = ((low < 0) & (high > 0)).nonzero().squeeze(1)
                self.parts[i] = slice(count, count + len(self.places[i]))
                count += len(self.places[i])
        self.count = count
        self.batch = max(8, min(BOXES, NUMBERS // network.width))

    def search(self, bound: Tensor, deadline: Deadline) -> Verdict:
        """Split boxes, those with the worst bounds first, until none is left or time is up."""
        start = torch.zeros(len(bound), self.count, dtype=torch.float16)
        chosen = [(-s[0] < s[1]).flatten()[self.places[i]] for i, s in self.spans.items()
                  if i in self.places]  # fmt: skip
        slopes = torch.cat(chosen or [torch.zeros(0)]).half().expand(len(bound), -1)
        boxes = _Boxes(torch.arange(len(bound)), start.to(torch.int8), slopes, start, bound)
        done, proven = 0, torch.inf
        while len(boxes):
            if deadline.passed:
                return Verdict("open", "branch and bound", float(boxes.bound.min()), None, done)
            order = boxes.bound.argsort()
            now, boxes = boxes.take(order[: self.batch]), boxes.take(order[self.batch :])
            done += len(now)
            now, gains, corner = self._raised(now)
            witness = confirmed(self.network, self.region, self.rule, corner, self.dtype)
            if witness is not None:
                return Verdict("falsified", "branch and bound", -torch.inf, witness, done)
            open_ = ~(now.bound > self.slack)
            proven = min(proven, float(now.bound[~open_].min()) if not open_.all() else proven)
            split = open_ & (now.signs == 0).any(1)
            ended = (open_ & ~split).nonzero().squeeze(1)
            if len(ended):
                verdict = self._ended(now.take(ended), done)
                if verdict is not None:
                    return verdict
            if bool(split.any()):
                boxes = boxes.join(self._children(now.take(split), gains[split]))
        return Verdict("certified", "branch and bound", proven, None, done)

    def _ended(self, boxes: _Boxes, done: int) -> Verdict | None:
        """Settle boxes all of whose signs are given, by linear programs."""
        for row in range(len(boxes)):
            signs = {i: boxes.signs[row, part] for i, part in self.parts.items()}
            worst = torch.inf
            if self.count > SMALL or len(self.parts) < len(self.network.activations):
                return Verdict("open", "branch and bound", float(boxes.bound[row]), None, done)
            group = int(boxes.group[row])
            rows, offsets = self.rule.rows[group], self.rule.offsets[group]
            worst, point = least(
                self.network, self.region, rows, offsets, self.spans, self.places, signs, self.slack
            )
            if worst > self.slack:
                continue
            witness = None if point is None else confirmed(
                self.network, self.region, self.rule, point[None], self.dtype
            )  # fmt: skip
            status = "open" if witness is None else "falsified"
            return Verdict(status, "branch and bound", worst, witness, done)
        return None

    def _raised(self, boxes: _Boxes) -> tuple[_Boxes, Tensor, Tensor]:
        """Raise the bounds in α, β and the weights of the rows; return also gains and corners."""
        alpha, beta = (
            part.to(self.region.x.dtype).clone().requires_grad_()
            for part in (boxes.alpha, boxes.beta)
        )
        rows = self.rule.rows[boxes.group]
        weight = rows.new_zeros(rows.shape[:2]).requires_grad_()
        given = {"alpha": alpha, "beta": beta, "weight": weight}
        optimizer = torch.optim.Adam([{"params": [v], "lr": RATES[k]} for k, v in given.items()])
        fixed = self._fixed(boxes.signs)
        best = boxes.bound.clone()
        gains: dict[int, Tensor] = {}
        for step in range(STEPS + 1):
            with torch.enable_grad():
                bound, slope = self._bound(boxes, fixed, alpha, beta, weight, gains)
            best = torch.maximum(best, bound.detach())
            low = ~(best > self.slack)
            if step == STEPS or not bool(low.any()):
                break
            optimizer.zero_grad()
            with torch.enable_grad():
                (-bound[low].sum()).backward()
            optimizer.step()
            alpha.data.clamp_(0, 1)
            beta.data.clamp_(min=0)
        cost = torch.cat([gains[i].flatten(1)[:, self.places[i]] for i in self.parts], 1) if (
            self.parts) else rows.new_zeros(len(boxes), 0)  # fmt: skip
        raised = _Boxes(boxes.group, boxes.signs, alpha.detach().half(), beta.detach().half(), best)
        return raised, -cost, self.region.corner(slope)

    def _fixed(self, signs: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Return over, above, and under without what α adds, (boxes, neurons) by activation."""
        found = {}
        for i, part in self.parts.items():
            given, places, line = signs[:, part], self.places[i], self.base[i]
            on, free = (given > 0).to(line.over.dtype), given == 0
            over = torch.where(free, line.over.flatten()[places], on)
            above = torch.where(free, line.above.flatten()[places], 0)
            lines_ = (line.over, line.above, line.under)
            whole = [t.flatten().expand(len(signs), -1).clone() for t in lines_]
            for mixed, values in zip(whole, (over, above, on), strict=True):
                mixed[:, places] = values
            found[i] = whole[0], whole[1], whole[2]
        return found

    def _bound(
        self, boxes: _Boxes, fixed: dict[int, tuple[Tensor, Tensor, Tensor]], alpha: Tensor,
        beta: Tensor, weight: Tensor, gains: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        free = boxes.signs == 0
        relaxed, shifts = {i: line for i, line in self.base.items() if i not in fixed}, {}
        for i, (over, above, under) in fixed.items():
            shape = (len(boxes), *self.base[i].over.shape[1:])
            part, places = self.parts[i], self.places[i]
            slopes = under.index_add(1, places, alpha[:, part] * free[:, part])
            relaxed[i] = Lines(*(t.reshape(shape) for t in (slopes, over, above)))
            pull = beta[:, part] * boxes.signs[:, part]
            shifts[i] = spread(pull, places, torch.Size(shape))
        share = weight.softmax(1)
        rows = (share[:, :, None] * self.rule.rows[boxes.group]).sum(1)
        slope, offset = backward(
            self.network, self.network.output, rows[:, None], relaxed, shifts, gains
        )
        offset = offset + (share * self.rule.offsets[boxes.group]).sum(1)
        return self.region.least(slope, offset), slope

    def _children(self, boxes: _Boxes, gains: Tensor) -> _Boxes:
        """Give both signs to the neuron whose children have the best bounds."""
        gains = gains.masked_fill(boxes.signs != 0, -1)
        tried = min(AHEAD, self.count)
        score, which = gains.topk(tried, 1)
        many = torch.arange(len(boxes)).repeat_interleave(2 * tried)
        sons = boxes.take(many)
        at = which.repeat_interleave(2, 1).flatten()
        sign = torch.tensor([1, -1], dtype=torch.int8).repeat(len(boxes) * tried)
        again = sons.signs.gather(1, at[:, None]).squeeze(1) != 0
        sons.signs[torch.arange(len(many)), at] = torch.where(
            again, sons.signs.gather(1, at[:, None]).squeeze(1), sign
        )
        bound = self._look(sons)
        pair = bound.reshape(len(boxes), tried, 2)
        worth = pair.clamp(max=self.slack)
        worth = worth.amin(2) + 1e-3 * worth.sum(2)
        pick = worth.masked_fill(score < 0, -torch.inf).argmax(1)
        chosen = (torch.arange(len(boxes)) * tried + pick)[:, None] * 2 + torch.arange(2)
        chosen = chosen.flatten()
        found = sons.take(chosen)
        better = torch.maximum(bound[chosen], boxes.bound.repeat_interleave(2))
        return _Boxes(found.group, found.signs, found.alpha, found.beta, better)

    def _look(self, boxes: _Boxes) -> Tensor:
        found = []
        for rows in torch.arange(len(boxes)).split(self.batch):
            some = boxes.take(rows)
            alpha, beta = some.alpha.to(self.region.x.dtype), some.beta.to(self.region.x.dtype)
            weight = alpha.new_zeros(len(some), self.rule.rows.shape[1])
            with torch.no_grad():
                fixed = self._fixed(some.signs)
                found.append(self._bound(some, fixed, alpha, beta, weight, {})[0])
        return torch.cat(found)
