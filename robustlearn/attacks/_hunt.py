"""The hunt for the nearest adversarial point: what all minimal-norm attacks share."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlearn import losses
from robustlearn._geometry import (
    crossing,
    level,
    nearest_in_l0,
    nearest_in_l1,
    nearest_in_l2,
    row_norm,
)
from robustlearn._tensor import column, flat
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.threats import LpBall

FAR = 1e30  # no wall
BEYOND = 1e-4  # how far behind a linearised boundary a point is put, relative to the gap
HALVINGS = 6  # of a segment that crosses the boundary
GAINED = 1e-3  # a polishing step that brings a sample less than this share is its last


@dataclass(frozen=True, eq=False)
class Toward:
    """Climb z_j − z_y for one rival class j per sample."""

    rival: Tensor

    def at(self, rows: Tensor) -> "Toward":
        """Return the goal for some of the samples."""
        return Toward(self.rival[rows])

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_j − z_y (n,) and its derivative by the logits."""
        own, rival = y[:, None], self.rival[:, None]
        value = (output.gather(1, rival) - output.gather(1, own)).squeeze(1)
        return value, torch.zeros_like(output).scatter_(1, rival, 1.0).scatter_(1, own, -1.0)


class Hunt:
    """The samples that stand, and the nearest adversarial point found so far for each.

    Everything is measured in u = δ / scale, as rows (n, d): there the threat is a plain ball of
    the norm p within the walls ``low ≤ u ≤ high``, which are 0 for a frozen feature. For p = 0,
    where no scale matters, the unit is the width of the box.

    Attributes
    ----------
    size : number of samples that stand.
    low, high : (size, d) the walls.
    reach : (size,) ε, the farthest that counts.
    distance : (size,) float64, of the nearest adversarial point; infinite before the first.
    height : (size,) the largest objective seen within ε.
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor, threat: LpBall, loss: object) -> None:
        self.loss = losses.get(loss)
        if self.loss not in (losses.margin, losses.targeted_margin):
            raise InputError(
                f"the nearest point is sought by margin or targeted_margin, not {self.loss.name}: "
                "only these are 0 on the boundary"
            )
        self.model, self.everything, self.whole = model, x, threat
        self.output = model(x)
        self.kept = (~self.loss.broken(self.output, y)).nonzero().squeeze(1)
        self.output = self.output[self.kept]
        self.threat, self.x, self.y = threat.select(self.kept), x[self.kept], y[self.kept]
        self.size, self.p = len(self.kept), threat.p
        self.reach = self.threat._eps(self.x)
        box = replace(threat, p=torch.inf, eps=FAR)
        self.bottom, self.top = box.span(self.x)
        self.units = self._units()
        self.low, self.high = (self._in_units(wall) for wall in (self.bottom, self.top))
        self.best = self.x.clone()
        self.distance = torch.full((self.size,), torch.inf, dtype=torch.float64, device=x.device)
        self.highest = self.x.clone()  # of the points within ε that of largest objective
        self.height = x.new_full((self.size,), -torch.inf)
        if self.size:
            self.height = self.loss.objective(self.output, self.y).to(x.dtype)

    def _units(self) -> Tensor:
        units = torch.ones_like(self.x[:1]) if self.size else self.x
        if self.p == 0:
            width = (self.top.double() - self.bottom.double()).to(self.x.dtype)
            return flat(torch.where(width < FAR, width, 1.0))
        if self.threat.scale is not None:
            units = units * torch.as_tensor(self.threat.scale).to(units)
        if self.threat.mask is not None:
            units = units * self.threat.mask.to(units)
        return flat(units)

    def _in_units(self, point: Tensor, rows: Tensor | None = None) -> Tensor:
        start, units = flat(self.x), self.units
        if rows is not None:
            start, units = start[rows], units if len(units) == 1 else units[rows]
        moved = flat(point) - start
        return torch.where(units > 0, moved / torch.where(units > 0, units, 1), 0)

    # ------------------------------------------------------------------ points

    def point(self, u: Tensor, rows: Tensor) -> Tensor:
        """Return x + scale·u, put into the box without tolerance.

        Where that need not exist: a member of the threat with the budget ε, or ‖u‖ if it is more.
        """
        units = self.units if len(self.units) == 1 else self.units[rows]
        point = self.x[rows] + (u * units).reshape(-1, *self.x.shape[1:])
        point = point.clamp(self.bottom[rows], self.top[rows])
        if self.threat.convex:
            return point
        wide = torch.maximum(self.reach[rows], self.threat.norm(point - self.x[rows]))
        return replace(self.threat, eps=wide).land(self.x[rows], point)

    def norm(self, u: Tensor) -> Tensor:
        """‖u‖_p, (n,)."""
        return row_norm(u.abs(), self.p)

    def all(self) -> Tensor:
        """Return the numbers of all samples that stand."""
        return torch.arange(self.size, device=self.x.device)

    def rounds(self, steps: int) -> range:
        """Count the steps, none where no sample stands."""
        return range(steps if self.size else 0)

    def found(self) -> Tensor:
        """Return the numbers of the samples with an adversarial point."""
        return self.distance.isfinite().nonzero().squeeze(1)

    def nearest(self, rows: Tensor) -> Tensor:
        """Return u of the nearest adversarial points found."""
        return self._in_units(self.best[rows], rows)

    # ------------------------------------------------------------------ looking at the model

    def look(
        self, u: Tensor, rows: Tensor, goal: Toward | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One gradient per sample: ∂/∂u of the loss or the goal; adversarial points are kept.

        Returns
        -------
        gradient (n, d), objective (n,), positive on success, and broken (n,) bool.
        """
        point = self.point(u, rows)
        gradient, value, output = self.model.gradient(point, self.y[rows], goal or self.loss)
        units = self.units if len(self.units) == 1 else self.units[rows]
        broken, _ = self._record(point, output, rows)
        return flat(gradient) * units, value.to(u.dtype), broken

    def test(self, u: Tensor, rows: Tensor) -> Tensor:
        """Send points forward, keep the adversarial ones, and tell which they are."""
        return self.measure(u, rows)[0]

    def measure(self, u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Do as `test` does, and return the objective (n,) too."""
        point = self.point(u, rows)
        return self._record(point, self.model(point), rows)

    def _record(self, point: Tensor, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        broken = self.loss.broken(output, self.y[rows])
        distance = self.threat.norm(point.double() - self.x[rows].double())
        nearer = broken & (distance < self.distance[rows])
        self.best[rows[nearer]], self.distance[rows[nearer]] = point[nearer], distance[nearer]
        height = self.loss.objective(output, self.y[rows]).to(self.height.dtype)
        higher = (height > self.height[rows]) & (distance <= self.reach[rows])
        self.highest[rows[higher]], self.height[rows[higher]] = point[higher], height[higher]
        return broken, height

    # ------------------------------------------------------------------ moves

    def inward(self, gradient: Tensor, u: Tensor) -> Tensor:
        """Return the gradient without the features that stand at the wall it points at."""
        stuck = torch.where(gradient > 0, u >= self.high, u <= self.low)
        return gradient.masked_fill(stuck, 0)

    def project(self, u: Tensor, eps: Tensor) -> Tensor:
        """Return the nearest point within ‖u‖_p ≤ eps (n,) and the walls, one row a sample."""
        wanted = u.clamp(self.low, self.high)
        size, room, eps = u.abs(), wanted.abs(), eps[:, None]
        if math.isinf(self.p):
            return wanted.clamp(-eps, eps)
        nearest = {0: nearest_in_l0, 1: _nearest_in_l1, 2: nearest_in_l2}[int(self.p)]
        outside = self.norm(wanted)[:, None] > eps
        return torch.where(outside, nearest(size, room, eps) * wanted.sign(), wanted)

    def stretch(self, u: Tensor, eps: Tensor) -> Tensor:
        """Return t·u cut at the walls with the one t ≥ 0 that makes its ‖·‖₂ eps (n,)."""
        room = torch.where(u > 0, self.high, -self.low)
        cap = torch.where(u != 0, room / u.abs(), torch.inf)
        t = level(u.square(), cap.square(), eps.square()).sqrt()[:, None]
        return torch.where(u != 0, torch.minimum(t * u.abs(), room), 0) * u.sign()

    def cross(
        self, gradient: Tensor, gap: Tensor, rows: Tensor, around: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the least step v with ⟨gradient, v⟩ ≥ gap within the walls, and whether it does.

        Around u = 0, or around other points of the box.
        """
        low, high = self.low[rows], self.high[rows]
        if around is not None:
            low, high = (low - around).clamp(max=0), (high - around).clamp(min=0)
        room = torch.where(gradient > 0, high, -low)
        room = torch.where(room < FAR / 2, room, torch.inf)
        step, within = crossing(gradient.abs(), room, gap, self.p)
        step = torch.where(step.isfinite(), step, 0)
        return step * gradient.sign(), within

    def rivals(self, most: int) -> list[Toward | None]:
        """Return goals in the order of closeness: z_j − z_y of each rival, or the loss itself."""
        if self.size == 0:
            return []
        if self.loss is not losses.margin:
            return [None]
        others = self.output.scatter(1, self.y[:, None], -torch.inf)
        order = others.argsort(dim=1, descending=True, stable=True)[:, :-1]
        return [Toward(rival) for rival in order[:, :most].T]

    def open(self, most: int) -> Tensor:
        """Step across the nearest of the boundaries to the closest rivals, linearised at x.

        One gradient for each of ``most`` rivals and one forward pass. Where no boundary is in
        reach u = 0.
        """
        rows, start = self.all(), torch.zeros_like(flat(self.x))
        best = torch.full_like(start[:, 0], torch.inf)
        chosen = start.clone()
        for goal in self.rivals(most):
            gradient, value, _ = self.look(start, rows, goal)
            step, within = self.cross(gradient, -value * (1 + BEYOND), rows)
            length = self.norm(step)
            better = within & (length < best) & (length > 0)
            best, chosen = (
                torch.where(better, length, best),
                torch.where(better[:, None], step, chosen),
            )
        if self.size:
            self.test(chosen, rows)
        return chosen

    def polish(self, steps: int) -> None:
        """Draw the points found towards the nearest point of the boundary, linearised there.

        v = argmin ‖v‖_p over ⟨g, v − u⟩ + objective(u) ≥ 0 and the walls; then the segment from
        v to u is halved until it is nearly at the boundary. One gradient and at most seven
        forward passes a step; a sample leaves when it gains no more.
        """
        rows = self.found()
        for _ in range(steps):
            if len(rows) == 0:
                break
            before, u = self.distance[rows], self.nearest(rows)
            gradient, value, _ = self.look(u, rows)
            gap = (gradient * u).sum(1) - value
            wish, _ = self.cross(gradient, gap + BEYOND * gap.abs(), rows)
            if self.p == 0:
                self._thin(u, wish, gradient, rows)
            else:
                self._draw(u, wish, rows)
            rows = rows[self.distance[rows] < before * (1 - GAINED)]

    def _draw(self, u: Tensor, wish: Tensor, rows: Tensor) -> None:
        """Halve the segment from u, which is adversarial, to what is nearer to x."""
        open_rows = (~self.test(wish, rows)).nonzero().squeeze(1)
        rows, near, far = rows[open_rows], wish[open_rows], u[open_rows]
        for _ in range(HALVINGS):
            if len(rows) == 0:
                break
            middle = (near + far) / 2
            broken = self.test(middle, rows)[:, None]
            near, far = torch.where(broken, near, middle), torch.where(broken, middle, far)

    def _thin(self, u: Tensor, wish: Tensor, gradient: Tensor, rows: Tensor) -> None:
        """Halve the number of changed features that are kept, those of largest effect first."""
        self.test(wish, rows)
        effect = (gradient * u).masked_fill(u == 0, -torch.inf)
        order = effect.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(u.shape[1], device=u.device).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, place)
        low, high = torch.zeros_like(rows), (u != 0).sum(1)
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            broken = self.test(torch.where(rank < middle[:, None], u, 0), rows)
            low, high = torch.where(broken, low, middle), torch.where(broken, middle, high)

    def end(self, last: Tensor, polish: int) -> Tensor:
        """Look at the last points, polish the nearest, and return what lies within ε.

        Where nothing adversarial was found there, it is the point of largest objective that was
        seen in the threat.

        Returns
        -------
        (n, *shape) for all samples, in the threat without tolerance.
        """
        if self.size == 0:
            return self.everything.clone()
        self.test(last, self.all())
        self.polish(polish)
        lost = (self.distance > self.reach).nonzero().squeeze(1)
        self._draw_back(last, lost)
        best = torch.where(column(self.distance > self.reach, self.x), self.highest, self.best)
        whole = self.everything.clone()
        whole[self.kept] = self.threat.enclose(self.x, best)
        return whole

    def _draw_back(self, last: Tensor, rows: Tensor) -> None:
        """Look where the threat ends: below the nearest points found, and along the gradient."""
        if len(rows) == 0:
            return
        threat, x = self.threat.select(rows), self.x[rows]
        far = torch.where(
            column(self.distance[rows].isinf(), x), self.point(last[rows], rows), self.best[rows]
        )
        ends = [threat.enclose(x, far)]
        if self.p > 0 or (threat.lower is not None and threat.upper is not None):
            gradient, _, _ = self.model.gradient(x, self.y[rows], self.loss)
            ends.append(threat.restrict(x, threat.argmax(gradient, x)))
        for point in ends:
            self._record(point, self.model(point), rows)


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Fall from first to last along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def unit(gradient: Tensor) -> Tensor:
    """g/‖g‖₂ of each row, by the largest entry first; 0 where g is 0."""
    top = gradient.abs().amax(1, keepdim=True)
    rows = gradient / torch.where(top > 0, top, 1)
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1)


def _nearest_in_l1(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    return nearest_in_l1(size, room, None, eps)
