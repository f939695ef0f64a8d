"""Decide a property of a network: certified, falsified by a witness, or open when time is up.

First a short attack, then intervals, CROWN and α-CROWN, then branch and bound over the signs of
ReLU: each box is split where a look ahead promises most, its bound is raised in the slopes α and
the multipliers β of its signs, and the corner that minimises each linear bound is tried as a
counterexample (Wang et al., 2021). Where all signs are given the network is affine, and β come
from a linear program. No solver is trusted: bounds are evaluated here, points tried.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.certify.bounds import (
    NEVER,
    Deadline,
    crown_bounds,
    interval_bounds,
    margin_rows,
    row_bounds,
    spread,
)
from robustlearn.certify.relax import Lines, Region, Span_of, backward, lines
from robustlearn.models.graph import Network

BOXES = 256  # split together, if they are narrow
NUMBERS = 2**20  # in the widest value of all boxes that are split together
STEPS = 12  # of ascent in a box
AHEAD = 4  # neurons that are tried
RATES = {"alpha": 0.1, "beta": 0.05, "weight": 0.2}
RAISED, REFINED = 20, 10  # steps of ascent for a row, for each neuron whose sign is open
PARTS = 3  # of the time that is left, one of them for the latter
ROUNDED, FLOAT64 = 100, torch.finfo(torch.float64).eps / 2  # standard deviations of rounding
CUTS = 100  # planes that may stand for a ball in a linear program
CLEAR = 1e-9  # value of a linear program in units of its planes, from which it is no rounding


@dataclass(frozen=True, eq=False)
class Property:
    """What must not be: for some group, rows·y + offsets ≤ 0 in all of its rows.

    ``rows`` are (g, m, K) and ``offsets`` (g, m), padded by repeating a row. Unless ``closed``, a
    value of 0 alone is no violation: the class may win that tie.
    """

    rows: Tensor
    offsets: Tensor
    closed: bool = False

    @classmethod
    def of_class(cls, label: int, classes: int) -> "Property":
        """Return that another class is at least as high as this one."""
        rows = margin_rows(torch.tensor([label]), classes)[0][:, None]
        return cls(rows, rows.new_zeros(rows.shape[:2]))

    def value(self, output: Tensor) -> Tensor:
        """Return max over the rows of a group, (n, g): ≤ 0 where the property is violated."""
        return (torch.einsum("gmk,nk->ngm", self.rows, output) + self.offsets).amax(2)

    @property
    def size(self) -> float:
        """The largest offset."""
        return float(self.offsets.abs().max())

    def violated(self, output: Tensor) -> Tensor:
        """Tell which outputs are what must not be, (n,)."""
        value = self.value(output).amin(1)
        return value <= 0 if self.closed else value < 0

    def select(self, groups: Tensor) -> "Property":
        """Return some of its groups."""
        return replace(self, rows=self.rows[groups], offsets=self.offsets[groups])


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
) -> Verdict:
    """Decide whether a property holds all over the region of one sample.

    Parameters
    ----------
    region : of one sample in float64; rule : what must not be.
    slack : by how much rows must stay positive, for the rounding of whoever runs the network; that
        of the bounds themselves is added.
    dtype : that a witness must be representable in, and is attained in.
    """
    slack += ROUNDED * float(network.rounding(*region.box, FLOAT64)[0] + FLOAT64 * rule.size)
    bound = torch.full((len(rule.rows),), -torch.inf, dtype=region.x.dtype)
    open_, by = torch.arange(len(rule.rows)), ""
    for by, spans, steps in _stages(network, region, deadline):
        rows = rule.rows[open_].flatten(0, 1)[:, None]
        found = row_bounds(
            network, region, network.output, rows, torch.tensor([0]), spans, steps=steps,
            deadline=deadline,
        )  # fmt: skip
        found = (found.reshape(len(open_), -1) + rule.offsets[open_]).amax(1)
        bound[open_] = torch.maximum(bound[open_], found)
        open_ = (~(bound > slack)).nonzero().squeeze(1)
        if not len(open_):
            return Verdict("certified", by, float(bound.min()))
        if by == "crown_ibp":
            witness = falsify(network, region, rule, dtype, deadline=deadline)
            if witness is not None:
                return Verdict("falsified", "attack", -torch.inf, witness)
        if deadline.passed:
            return Verdict("open", by, float(bound.min()))
    tree = _Tree(network, region, rule.select(open_), spans, slack, dtype, deadline)
    verdict = tree.search(bound[open_])
    return replace(verdict, bound=min([verdict.bound, *bound[bound > slack].tolist()]))


def _stages(
    network: Network, region: Region, deadline: Deadline
) -> Iterator[tuple[str, Span_of, int]]:
    """Yield what to try, the cheapest first: a name, bounds of the activations, steps of ascent."""
    yield "crown_ibp", interval_bounds(network, region), 0
    spans = crown_bounds(network, region, deadline=deadline)
    yield "crown", spans, 0
    yield "alpha_crown", spans, RAISED
    if not network.is_shallow:
        share = deadline.share(PARTS)
        yield "alpha_crown", crown_bounds(network, region, steps=REFINED, deadline=share), RAISED


def falsify(
    network: Network,
    region: Region,
    rule: Property,
    dtype: torch.dtype = torch.float64,
    *,
    steps: int = 40,
    restarts: int = 4,
    deadline: Deadline = NEVER,
) -> Tensor | None:
    """Look for a violation by the method of Frank and Wolfe from random points of the region.

    δ ← (1 − γ)δ + γ·argmax⟨−∇, ·⟩ stays in every convex threat; γ falls from 1/2.
    """
    threat, groups = region.threat, len(rule.rows)
    if not threat.convex or threat.p == 0:
        return None
    x = region.x.expand(groups * restarts, *region.x.shape[1:])
    target = torch.arange(groups).repeat_interleave(restarts)
    ball = threat.select(torch.zeros(len(x), dtype=torch.long))
    signs = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    delta = ball.argmax(signs, x)
    delta[::restarts] = 0
    for step in range(steps):
        if deadline.passed:
            break
        with torch.enable_grad():
            leaf = delta.requires_grad_()
            value = rule.value(network(x + leaf)).gather(1, target[:, None]).squeeze(1)
            if not value.requires_grad:  # the network cuts its gradient
                return None
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        delta = delta.detach()
        found = confirmed(network, region, rule, (x + delta)[value <= 0], dtype)
        if found is not None:
            return found
        gamma = 1 / (2 + step / 4)
        delta = (1 - gamma) * delta + gamma * ball.argmax(-slope, x)
    return confirmed(network, region, rule, x + delta, dtype)


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
        wrong = rule.violated(network(inside)) & ball.contains(x, inside)
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
        dtype: torch.dtype, deadline: Deadline,
    ) -> None:  # fmt: skip
        self.network, self.region, self.rule = network, region, rule
        self.spans, self.slack, self.dtype, self.deadline = spans, slack, dtype, deadline
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
        self.curves = lines(network, {i: s for i, s in spans.items() if i not in self.parts})
        self.batch = max(8, min(BOXES, NUMBERS // network.width))

    def search(self, bound: Tensor) -> Verdict:
        """Split boxes, those with the worst bounds first, until none is left or time is up."""
        start = torch.zeros(len(bound), self.count, dtype=torch.float16)
        chosen = [(-s[0] < s[1]).flatten()[self.places[i]] for i, s in self.spans.items()
                  if i in self.places]  # fmt: skip
        slopes = torch.cat(chosen or [torch.zeros(0)]).half().expand(len(bound), -1)
        boxes = _Boxes(torch.arange(len(bound)), start.to(torch.int8), slopes, start, bound)
        done, status, least = 0, "certified", torch.inf  # of the boxes that are not split further
        while len(boxes):
            if self.deadline.passed:
                status, least = "open", min(least, float(boxes.bound.min()))
                break
            order = boxes.bound.argsort()
            now, boxes = boxes.take(order[: self.batch]), boxes.take(order[self.batch :])
            done += len(now)
            now, gains, points = self._raised(now)
            split = ~(now.bound > self.slack) & (now.signs == 0).any(1)
            for row in (~(now.bound > self.slack) & ~split).nonzero().flatten().tolist():
                if self.deadline.passed:
                    break
                now.bound[row], points[row] = self._programmed(now.take(torch.tensor([row])))
            witness = confirmed(self.network, self.region, self.rule, points, self.dtype)
            if witness is not None:
                return Verdict("falsified", "branch and bound", -torch.inf, witness, done)
            least = min([least, *now.bound[~split].tolist()])
            status = status if least > self.slack else "open"
            if bool(split.any()):
                now, late = now.take(split), self.deadline.passed
                boxes = boxes.join(now if late else self._children(now, gains[split]))
        return Verdict(status, "branch and bound", least, None, done)

    def _programmed(self, box: _Boxes) -> tuple[float, Tensor]:
        """Bound a box all of whose signs are given, and return where that is attained.

        min over the region of max(rows·y + offsets − slack, −s·z), all of them affine there: > 0
        is a proof, < 0 a violation. The duals of a linear program, whatever its tolerances, are
        weights of the rows and β at which `_bound` holds (Neumaier and Shcherbina, 2004). A ball
        that is no box is cut out by planes ⟨g, δ⟩ ≤ support(g), g the gradient of its norm at the
        point found.
        """
        relaxed = self._relaxed(box.signs)
        slope, offset = self._planes(box, relaxed)
        low, high = (side.flatten().numpy() for side in self.region.box)
        middle, radius = (low + high) / 2, (high - low) / 2
        matrix, floor = slope * radius, slope @ middle + offset
        size = np.abs(matrix).sum(1) + np.abs(floor) + np.finfo(float).tiny
        above = np.concatenate([matrix / size[:, None], -np.ones((len(size), 1))], 1)
        below, best, point = -floor / size, float(box.bound), self.region.x[0]
        for _ in range(CUTS):
            found = optimize.linprog(
                np.eye(len(low) + 1)[-1], above, below,
                bounds=[(-1, 1)] * len(low) + [(None, None)],
            )  # fmt: skip
            if found.status:
                break
            point = torch.as_tensor(middle + radius * found.x[:-1]).reshape(self.region.x.shape)
            if found.fun > CLEAR:
                duals = -found.ineqlin.marginals[: len(size)].clip(max=0)
                best = max(best, self._dual(box, relaxed, duals, size))
            if self.region.is_box or best > self.slack or self.deadline.passed:
                break
            cut = self._cut(point)
            if cut is None:
                break
            normal, reach, point = cut
            above = np.append(above, [[*(normal * radius), 0.0]], 0)
            below = np.append(below, reach - normal @ middle)
        return best, point.reshape(self.region.x[0].shape)

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
        relaxed = self._relaxed(boxes.signs)
        best = boxes.bound.clone()
        gains: dict[int, Tensor] = {}
        for step in range(STEPS + 1):
            with torch.enable_grad():
                bound, slope = self._bound(boxes, relaxed, alpha, beta, weight.softmax(1), gains)
            best = torch.maximum(best, bound.detach())
            low = ~(best > self.slack)
            if step == STEPS or not bool(low.any()) or self.deadline.passed:
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

    def _relaxed(self, signs: Tensor) -> dict[int, Lines]:
        """Return the lines of boxes: exact where a sign is given."""
        spans = {}
        for i, part in self.parts.items():
            places, shape = self.places[i], (len(signs), *self.spans[i][0].shape[1:])
            low, high = (side.flatten(1).repeat(len(signs), 1) for side in self.spans[i])
            low[:, places] = torch.where(signs[:, part] > 0, 0, low[:, places])
            high[:, places] = torch.where(signs[:, part] < 0, 0, high[:, places])
            spans[i] = low.reshape(shape), high.reshape(shape)
        return {**self.curves, **lines(self.network, spans)}

    def _bound(
        self, boxes: _Boxes, exact: Mapping[int, Lines], alpha: Tensor, beta: Tensor,
        share: Tensor, gains: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Bound the rows by shares, with slopes α under what is open and β of what is given."""
        free = boxes.signs == 0
        relaxed, shifts = dict(exact), {}
        for i, part in self.parts.items():
            line, places = exact[i], self.places[i]
            under = line.under.flatten(1)
            chosen = torch.where(free[:, part], alpha[:, part], under[:, places])
            under = under.index_copy(1, places, chosen)
            relaxed[i] = replace(line, under=under.reshape(line.under.shape))
            shifts[i] = spread(beta[:, part] * boxes.signs[:, part], places, line.under.shape)
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
            share = alpha.new_ones(len(some), self.rule.rows.shape[1]) / self.rule.rows.shape[1]
            with torch.no_grad():
                relaxed = self._relaxed(some.signs)
                found.append(self._bound(some, relaxed, alpha, beta, share, {})[0])
        return torch.cat(found)

    def _planes(self, box: _Boxes, relaxed: Mapping[int, Lines]) -> tuple[np.ndarray, np.ndarray]:
        """Return slopes and offsets, by x, of rows·y + offsets − slack and of −s·z."""
        group, count = int(box.group), self.rule.offsets.shape[1]
        asked = [(self.network.output, self.rule.rows[group][:, None])]
        for i, part in self.parts.items():
            signs = torch.diag(box.signs[0, part].to(self.region.x.dtype))
            if len(signs):
                asked.append((i, spread(-signs, self.places[i], self.spans[i][0].shape)))
        found = [backward(self.network, i, rows, relaxed) for i, rows in asked]
        slope = torch.cat([flat(slope) for slope, _ in found]).numpy()
        offset = torch.cat([offset for _, offset in found]).numpy()
        offset[:count] += self.rule.offsets[group].numpy() - self.slack
        return slope, offset

    def _dual(
        self, box: _Boxes, relaxed: Mapping[int, Lines], duals: np.ndarray, size: np.ndarray
    ) -> float:
        """Bound a box with multipliers of planes of unit size; −∞ if that may be rounding."""
        count = self.rule.offsets.shape[1]
        duals[:count] += CLEAR  # if no point has these signs, the rows had no weight
        share, beta = torch.as_tensor(duals / size)[None].split([count, self.count], 1)
        total = share.sum()
        bound, _ = self._bound(box, relaxed, beta, beta / total, share / total, {})
        return float(bound) if float((bound - self.slack) * total) > CLEAR else -np.inf

    def _cut(self, point: Tensor) -> tuple[np.ndarray, float, Tensor] | None:
        """Return ⟨g, x'⟩ ≤ c, which cuts off a point outside, and the nearest towards x inside."""
        x, threat = self.region.x, self.region.threat
        moves = (self.region.box[0] < self.region.box[1]).squeeze(1)  # others have no derivative
        with torch.enable_grad():
            delta = torch.where(moves, point - x, 0).requires_grad_()
            norm = threat.norm(delta)
            share = float(torch.as_tensor(threat.eps) / norm.detach())
            if not share < 1 - CLEAR:  # it is inside, or nothing may move
                return None
            (normal,) = torch.autograd.grad(norm.sum(), delta)
        normal = torch.where(moves, normal, 0)
        reach = threat.support(normal, x) + (flat(normal) * flat(x)).sum(1)
        return flat(normal)[0].numpy(), float(reach), x + delta.detach() * share
