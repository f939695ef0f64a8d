"""What the adversary may do: a set of allowed changes δ, as five operations and a check.

Norms are data and threats are geometry: every attack, closed form and certificate is written
on ``norm, support, argmax, project, sample``, so that a new threat works with all of them.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn._geometry import (
    conjugate,
    knapsack,
    largest,
    level,
    nearest_in_ellipsoid,
    nearest_in_l0,
    nearest_in_l1,
    nearest_in_l2,
    row_norm,
)
from robustlearn._tensor import column, flat, per_sample
from robustlearn.errors import InputError

ROUNDING = 2.0**-46  # relative room that `restrict` leaves for the rounding of a float64 norm


@dataclass(frozen=True, eq=False)
class LpBall:
    r"""{δ : ‖δ / scale‖_p ≤ eps, lower ≤ x + δ ≤ upper, δⱼ = 0 where maskⱼ is False}.

    Parameters
    ----------
    p : 1 ≤ p ≤ ∞, or 0. ``norm``, ``support`` and ``argmax`` take any p, ``project`` and
        ``sample`` take 0, 1, 2 and ∞.
    eps : budget ε ≥ 0, a number or one per sample, in units of ``scale``; for p = 0 how many
        features may change, each as far as the box lets it.
    lower, upper : the box that x + δ must stay in: a number or an array of the sample's
        shape; None for no wall.
    mask : array of the sample's shape, True where a feature may change; None for everywhere.
    scale : positive array of the sample's shape (or a number): the unit in which the change
        of each feature is counted, for instance its standard deviation; 0 freezes a feature.

    Notes
    -----
    All operations take batches of any shape (n, \*shape), float32 or float64, on any device,
    and work per sample. With a box or a mask the set depends on the point, so the operations
    take ``x`` too; x itself must lie in the box. With cₖ = |gₖ|·scaleₖ and the room rₖ to the
    wall that gₖ points at (in units of scale), the maximum of ⟨g, δ⟩ is the separable problem
    max Σ cₖuₖ over ‖u‖_p ≤ ε, 0 ≤ u ≤ r. It is filled greedily for p = 1 (a fractional
    knapsack), cut at ε for p = ∞, and for 1 < p < ∞ its solution is
    uₖ = min(rₖ, t·cₖ^(1/(p−1))) at the one level t that spends the budget. For p = 0 it is rₖ at
    the ⌊ε⌋ features of largest cₖrₖ; that set is a cone without its box, so ``argmax`` and
    ``sample`` need both walls. It is not convex, but δ may be shortened in it.

    Examples
    --------
    >>> import torch
    >>> ball = LpBall(2, 1.0, lower=0.0, upper=1.0)
    >>> x, g = torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 4.0]])
    >>> ball.argmax(g, x)                       # stopped by the walls at 1
    tensor([[0.5000, 0.5000]])
    >>> ball.support(g, x)                      # ⟨g, δ⟩ there
    tensor([3.5000])
    """

    tight: ClassVar[bool] = True  # whether a member attains `support`
    convex: ClassVar[bool] = True  # whether what lies between two members is one (but for p = 0)

    p: float
    eps: Any
    lower: Any = field(default=None, kw_only=True)
    upper: Any = field(default=None, kw_only=True)
    mask: Any = field(default=None, kw_only=True)
    scale: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (
            isinstance(self.p, bool)
            or not isinstance(self.p, numbers.Real)
            or not (self.p >= 1 or self.p == 0)
        ):
            raise InputError(f"p must be a number from 1 to math.inf, or 0; got {self.p!r}")
        object.__setattr__(self, "p", float(self.p))
        object.__setattr__(self, "eps", _budget(self.eps))
        for name in ("lower", "upper", "scale"):
            object.__setattr__(self, name, _number_or_array(getattr(self, name), name))
        if self.mask is not None:
            mask = _tensor.as_tensor(self.mask, "mask")
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise InputError("mask must be boolean: True where a feature may change")
            object.__setattr__(self, "mask", mask.bool())
        if self.scale is not None and bool((torch.as_tensor(self.scale) < 0).any()):
            raise InputError("scale must not be negative: it is the unit of each feature")
        if self.lower is not None and self.upper is not None:
            lower, upper = torch.as_tensor(self.lower), torch.as_tensor(self.upper)
            if lower.dim() and upper.dim() and lower.shape != upper.shape:
                raise InputError(
                    f"lower and upper have different shapes, {tuple(lower.shape)} and "
                    f"{tuple(upper.shape)}: give each as a number or in the sample's shape"
                )
            if bool((lower > upper).any()):
                raise InputError("lower must not exceed upper; are they swapped?")

    # ------------------------------------------------------------------ the five operations

    def norm(self, delta: Tensor) -> Tensor:
        """‖δ / scale‖_p per sample, a count for p = 0; infinite where a frozen feature moved.

        Returns
        -------
        (n,) in the dtype of ``delta``.
        """
        units, frozen = self._units(delta), self._frozen(delta)
        moved = flat(delta).abs()
        if units is not None:
            moved = torch.where(units > 0, moved / units, torch.where(moved > 0, torch.inf, 0))
        if frozen is not None:
            moved = torch.where(frozen & (moved > 0), torch.inf, moved)
        if self.p == 0:
            return torch.where(moved.isinf().any(1), torch.inf, row_norm(moved, 0))
        return row_norm(moved, self.p)

    def support(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """max ⟨g, δ⟩ over the set, per sample: ε‖scale·g‖_q where there is no wall.

        With walls it is evaluated on the dual side, min over 0 ≤ m ≤ c of
        ε‖m‖_q + Σ rₖ(cₖ − mₖ): every m gives an upper bound, so that rounding in m cannot
        make a certificate unsound. Exact, O(d log d).

        Parameters
        ----------
        g : (n, *shape) the direction.
        x : (n, *shape) the points; needed where there is a box.

        Returns
        -------
        (n,) in the dtype of ``g``; infinite nowhere, but for p = 0 where there is no wall.
        """
        gain, eps = self.gain(g), self._eps(g)
        room = self.room(g, x)
        if self.p == 0:
            room = torch.full_like(gain, torch.inf) if room is None else room
            worth = torch.where(gain > 0, gain * room, 0)
            return torch.where(largest(worth, eps.floor()), worth, 0).sum(1)
        dual = conjugate(self.p)
        if room is None:
            return eps * row_norm(gain, dual)
        if math.isinf(self.p):
            return (gain * torch.minimum(eps[:, None], room)).sum(1)
        kept = torch.minimum(gain, self._price(gain, room, eps))
        walled = torch.where(gain > kept, room * (gain - kept), 0).sum(1)
        return eps * row_norm(kept, dual) + walled

    def argmax(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the δ of the set that attains max ⟨g, δ⟩; exact, O(d log d).

        Parameters and errors as for `support`; where g is zero, δ is zero.

        Returns
        -------
        (n, *shape) in the dtype of ``g``.
        """
        room = self.room(g, x)
        if math.isinf(self.p) and room is None and self.scale is None:
            return g.sign() * (self.eps if isinstance(self.eps, float) else per_sample(self.eps, g))
        gain, eps = self.gain(g), self._eps(g)
        if math.isinf(self.p):
            spent = eps[:, None].expand_as(gain)
            spent = spent if room is None else torch.minimum(spent, room)
        elif self.p == 1:
            spent = knapsack(gain, room, eps)
        elif self.p == 0:
            spent = self._fewest(gain, room, eps)
        else:
            spent = self._filled(gain, room, eps)
        units = self._units(g)
        moved = spent if units is None else spent * units
        return moved.reshape(g.shape) * g.sign()

    def project(self, delta: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the member of the set that is nearest to ``delta`` in Euclidean distance.

        Exact up to the rounding of the dtype for p = 0, 1, 2 and ∞, box, mask and scale
        included (for p = 0 one of the nearest); use `restrict` for a point that is feasible
        without tolerance.

        Returns
        -------
        (n, *shape) in the dtype of ``delta``.

        Raises
        ------
        InputError for another p.
        """
        return self.projector(delta, x)(delta)

    def projector(self, like: Tensor, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Return `project` around fixed points: what depends on x alone is worked out once.

        Parameters
        ----------
        like : (n, *shape) a batch of the shape, dtype and device of what is to be projected.
        x : the points; ``like`` itself by default.
        """
        x = like if x is None else x
        walls, units, eps = self._walls(like, x), self._units(like), self._eps(like)[:, None]
        if math.isinf(self.p):
            reach = eps if units is None else eps * units
            low, high = (-reach, reach) if walls is None else walls
            low, high = torch.maximum(low, -reach), torch.minimum(high, reach)
            shape = like.shape if low.numel() == like.numel() else (-1, *[1] * (like.dim() - 1))
            low, high = low.reshape(shape), high.reshape(shape)
            return lambda delta: delta.clamp(low, high)
        if self.p not in (0, 1, 2):
            raise InputError(f"project knows p = 0, 1, 2 and inf, not {self.p}")
        return lambda delta: self._nearest(delta, walls, units, eps)

    def _nearest(
        self,
        delta: Tensor,
        walls: tuple[Tensor, Tensor] | None,
        units: Tensor | None,
        eps: Tensor,
    ) -> Tensor:
        """Project for p = 0, 1 and 2."""
        wanted = flat(delta) if walls is None else flat(delta).clamp(*walls)
        if units is not None:
            wanted = torch.where(units > 0, wanted, 0)
        size = self.norm(wanted.reshape(delta.shape))[:, None]
        outside = size > eps
        if walls is None and units is None and self.p == 2:
            return torch.where(outside, wanted * (eps / size), wanted).reshape(delta.shape)
        if not bool(outside.any()):
            return wanted.reshape(delta.shape)
        size, room = flat(delta).abs(), wanted.abs()  # a nearer point goes no further than both
        if self.p == 0:
            nearest = nearest_in_l0(size, room, eps.floor())
        elif self.p == 1:
            nearest = nearest_in_l1(size, room, units, eps)
        elif units is None:
            return (nearest_in_l2(size, room, eps) * wanted.sign()).reshape(delta.shape)
        else:
            nearest = nearest_in_ellipsoid(size, room, units, eps)
        nearest = nearest * wanted.sign()
        return torch.where(outside, nearest, wanted).reshape(delta.shape)

    def inward(self, direction: Tensor, point: Tensor) -> Tensor:
        """Return a direction without the features that stand at the wall it points at."""
        walls = self._walls(direction, point)
        if walls is None:
            return direction
        up, down = (flat(direction).clamp(**side) for side in ({"min": 0}, {"max": 0}))
        falls, rises = (wall.sign().abs() for wall in walls)  # 0 at a wall
        return up.mul_(rises).add_(down.mul_(falls)).reshape(direction.shape)

    def sample(
        self, like: Tensor, generator: torch.Generator | Tensor | int | None = None
    ) -> Tensor:
        """Return a random δ of the set for each point of ``like``.

        Uniform in the ball (p = 1, 2, ∞), then projected into the box; for p = 0 uniform between
        the walls of ⌊ε⌋ random features.

        Parameters
        ----------
        like : (n, *shape) the points x.
        generator : a torch generator; a seed (the same draw for every sample); (n,) int64
            keys, one per sample; or None for torch's global generator.

        Returns
        -------
        (n, *shape) in the dtype of ``like``.
        """
        keys, shape = _tensor.keys(generator, like), tuple(like.shape[1:])
        d = max(1, math.prod(shape))
        if self.p == 0:
            return self._scattered(keys, like)
        if math.isinf(self.p):
            drawn = 2 * _tensor.uniform(keys, shape, like.dtype) - 1
        elif self.p == 2:
            drawn = _tensor.normal(keys, shape, like.dtype)
        elif self.p == 1:  # signed exponential numbers
            signed = 2 * _tensor.uniform(keys, shape, like.dtype) - 1
            drawn = -torch.log1p(-signed.abs()) * signed.sign()
        else:
            raise InputError(f"sample knows p = 0, 1, 2 and inf, not {self.p}")
        if not math.isinf(self.p):
            depth = _tensor.uniform(_tensor.fold(keys, 2), (), like.dtype) ** (1 / d)
            size = row_norm(flat(drawn).abs(), self.p).clamp_min(torch.finfo(like.dtype).tiny)
            drawn = drawn * per_sample(depth / size, like)
        units = self._units(like)
        stretched = flat(drawn) * self._eps(like)[:, None] * (1 if units is None else units)
        stretched = stretched.reshape(like.shape)
        walled = self.lower is not None or self.upper is not None or self.mask is not None
        return self.project(stretched, like) if walled else stretched

    def _scattered(self, keys: Tensor, like: Tensor) -> Tensor:
        """Sample for p = 0."""
        walls = self._walls(like, like)
        if self.lower is None or self.upper is None or walls is None:
            raise InputError("p = 0 bounds no change by itself: give the threat lower and upper")
        shape = tuple(like.shape[1:])
        units, (fall, rise) = self._units(like), walls
        free = (rise > fall) & (units is None or units > 0)
        lot = 1 - flat(_tensor.uniform(_tensor.fold(keys, 0), shape, like.dtype))
        chosen = largest(torch.where(free, lot, 0), self._eps(like).floor())
        share = flat(_tensor.uniform(_tensor.fold(keys, 1), shape, like.dtype))
        return torch.where(chosen, fall + share * (rise - fall), 0).reshape(like.shape)

    def tied(self, chosen: Tensor) -> Tensor:
        """Return the features (n, *shape) bool that must move together with the chosen ones."""
        return chosen

    # ------------------------------------------------------------------ points and checks

    def restrict(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return x + δ', feasible without any tolerance, where δ' is nearest to ``delta``.

        The projection is done in float64 and every coordinate of x + δ' is rounded towards x,
        so that the point stays inside when its distance and box are checked in float64. Exact
        but for that last rounding (one unit in the last place of x, and 2⁻⁴⁶ of ε for finite p
        or a scale); for p outside {0, 1, 2, ∞} the box is applied first and δ then scaled, which
        is feasible but not nearest.

        Returns
        -------
        (n, *shape) in the dtype of ``x``.
        """
        return self.enclose(x, x.double() + delta.double())

    def enclose(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the allowed point next to ``point``, as `restrict` does; it, where allowed."""
        direct = point.to(x.dtype)
        if math.isinf(self.p):
            return direct.clamp(*self.span(x))
        inside = self.contains(x, direct)
        if bool(inside.all()):
            return direct
        wide = x.double()
        step = point.double() - wide
        inner = self
        if self.p > 0:
            inner = dataclasses.replace(self, eps=self.eps * (1 - ROUNDING))
        if self.p in (0, 1, 2):
            step = inner.project(step, wide)
        elif (walls := self._walls(step, wide)) is not None:
            step = flat(step).clamp(*walls).reshape(step.shape)
        shrink = (inner._eps(step) / self.norm(step)).clamp(max=1).nan_to_num(0)
        step = step * per_sample(shrink, step)
        nearest = (wide + step).to(x.dtype)
        for _ in range(2):
            reached = nearest.double()
            over = (reached - wide).abs() > step.abs()
            if self.lower is not None:
                over |= reached < self._on(self.lower, wide)
            if self.upper is not None:
                over |= reached > self._on(self.upper, wide)
            if not bool(over.any()):
                break
            nearest = torch.where(over, torch.nextafter(nearest, x), nearest)
        nearest = torch.where(step == 0, x, nearest)
        return torch.where(column(inside, x), direct, nearest)

    def relaxed(self) -> "LpBall":
        """Return the ball in whose walls gradient steps walk; here the threat itself."""
        return self

    def land(self, x: Tensor, point: Tensor) -> Tensor:
        """Return what an attack on its way judges in place of ``point``; here the point itself.

        A threat whose `project` leads to points that do not exist returns a member.
        """
        return point

    def span(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value allowed to every coordinate by itself.

        In the dtype of x and without tolerance: for p = ∞ what lies between them passes
        `contains`; for p = 0 they are the box, or infinite.

        Returns
        -------
        two tensors (n, *shape).
        """
        wide = x.double()
        reach: Any = self.eps if isinstance(self.eps, float) else per_sample(self.eps, wide)
        if self.p == 0:
            reach = per_sample(torch.where(torch.as_tensor(self.eps) >= 1, torch.inf, 0.0), wide)
        if self.scale is not None:
            units = self._on(self.scale, wide)
            reach = torch.where(units > 0, reach * (1 - ROUNDING) * units, 0)
        if self.mask is not None:
            reach = torch.where(self.mask.to(wide.device), self._on(reach, wide), 0)
        low, high = wide - reach, wide + reach
        if self.lower is not None:
            low = low.clamp_min(self._on(self.lower, wide))
        if self.upper is not None:
            high = high.clamp_max(self._on(self.upper, wide))
        bottom, top = low.to(x.dtype), high.to(x.dtype)
        # both roundings may lead outside: to the dtype, and of the distance when it is measured
        below = (bottom < low) | (wide - bottom > reach)
        above = (top > high) | (top - wide > reach)
        bottom = torch.where(below, torch.nextafter(bottom, x), bottom)
        return bottom, torch.where(above, torch.nextafter(top, x), top)

    def contains(self, x: Tensor, point: Tensor) -> Tensor:
        """Tell for each sample, in float64 and without tolerance, whether ``point`` is allowed.

        Returns
        -------
        (n,) bool.
        """
        wide, reached = x.double(), point.double()
        inside = self.norm(reached - wide) <= self._eps(wide)
        if self.lower is not None:
            inside = inside & flat(reached >= self._on(self.lower, wide)).all(1)
        if self.upper is not None:
            inside = inside & flat(reached <= self._on(self.upper, wide)).all(1)
        return inside

    def check(self, x: Tensor) -> None:
        """Raise an InputError if the batch does not fit this threat: shapes, box, budgets."""
        shape = tuple(x.shape[1:])
        for name in ("lower", "upper", "mask", "scale"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shape:
                raise InputError(
                    f"the threat's {name} has shape {tuple(value.shape)}, but a sample has "
                    f"shape {shape}; give a number or an array of the sample's shape"
                )
        if isinstance(self.eps, Tensor) and len(self.eps) != len(x):
            raise InputError(f"there are {len(self.eps)} budgets eps for {len(x)} samples")
        if self._leaves_box(x):
            raise InputError(
                f"data outside the box: x spans [{float(x.min()):g}, {float(x.max()):g}], the "
                f"threat allows [{_span(self.lower)}, {_span(self.upper)}]; scale x, or give "
                "lower and upper in the units of x"
            )

    def _leaves_box(self, x: Tensor) -> bool:
        low = -math.inf if self.lower is None else self.lower
        high = math.inf if self.upper is None else self.upper
        if isinstance(low, float) and isinstance(high, float):
            bottom, top = x.aminmax()
            return float(bottom) < low or float(top) > high
        wide = x.double()
        return bool(((wide < self._on(low, wide)) | (wide > self._on(high, wide))).any())

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x in another dtype, rounded into the box where rounding would leave it.

        Raises
        ------
        InputError where x itself does not fit, as `check` has it.
        """
        self.check(x)
        rounded = x.to(dtype)
        for wall, inwards in ((self.lower, torch.inf), (self.upper, -torch.inf)):
            if wall is None:
                continue
            over = rounded.double() - self._on(wall, rounded.double())
            outside = over < 0 if inwards > 0 else over > 0
            moved = torch.nextafter(rounded, torch.full_like(rounded, inwards))
            rounded = torch.where(outside, moved, rounded)
        return rounded

    def select(self, index: Tensor) -> "LpBall":
        """Return the threat for some of the samples: one budget per sample is indexed along."""
        if not isinstance(self.eps, Tensor):
            return self
        return dataclasses.replace(self, eps=self.eps[index.to(self.eps.device)])

    def describe(self) -> dict[str, Any]:
        """Return the threat as plain data for a report."""
        eps = self.eps.tolist() if isinstance(self.eps, Tensor) else self.eps

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else value

        return {
            "type": "LpBall",
            "p": "inf" if math.isinf(self.p) else self.p,
            "eps": eps,
            **{name: plain(getattr(self, name)) for name in ("lower", "upper", "mask", "scale")},
        }

    def __str__(self) -> str:
        """Name the threat in a few words."""
        norm = "L∞" if math.isinf(self.p) else f"L{self.p:g}"
        eps = "per sample" if isinstance(self.eps, Tensor) else f"{self.eps:.4g}"
        box = ""
        if self.lower is not None or self.upper is not None:
            box = f" in [{_span(self.lower)}, {_span(self.upper)}]"
        extra = "".join(
            f", {name}" for name in ("mask", "scale") if getattr(self, name) is not None
        )
        return f"{norm} ≤ {eps}{box}{extra}"

    # ------------------------------------------------------------------ the set as rows

    def _on(self, value: Any, like: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)

    def _eps(self, like: Tensor) -> Tensor:
        return self._on(self.eps, like).expand(len(like))

    def _units(self, like: Tensor) -> Tensor | None:
        return None if self.scale is None else self._on(self.scale, like).reshape(1, -1)

    def _frozen(self, like: Tensor) -> Tensor | None:
        return None if self.mask is None else ~self.mask.to(like.device).reshape(1, -1)

    def _walls(self, like: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return how far each coordinate may fall (≤ 0) and rise (≥ 0); None for no limit."""
        if self.lower is None and self.upper is None and self.mask is None:
            return None
        boxed = self.lower is not None or self.upper is not None
        if boxed and x is None:
            raise InputError("this threat has a box, so the operation needs the points x too")
        point = flat(x) if boxed and x is not None else flat(like)
        fall, rise = torch.full_like(point, -torch.inf), torch.full_like(point, torch.inf)
        if self.lower is not None:
            fall = (self._on(self.lower, point).reshape(1, -1) - point).clamp(max=0)
        if self.upper is not None:
            rise = (self._on(self.upper, point).reshape(1, -1) - point).clamp(min=0)
        frozen = self._frozen(like)
        if frozen is not None:
            fall, rise = fall.masked_fill(frozen, 0), rise.masked_fill(frozen, 0)
        return fall.to(like.dtype), rise.to(like.dtype)

    def gain(self, g: Tensor) -> Tensor:
        """c = |g|·scale: what a unit of budget buys."""
        units = self._units(g)
        return flat(g).abs() if units is None else flat(g).abs() * units

    def room(self, g: Tensor, x: Tensor | None) -> Tensor | None:
        """r: the distance to the wall that g points at, in units of scale."""
        walls, units = self._walls(g, x), self._units(g)
        if walls is None:
            return None
        room = torch.where(flat(g) > 0, walls[1], -walls[0])
        return room if units is None else torch.where(units > 0, room / units, 0)

    def slope(self, gain: Tensor) -> Tensor:
        """c^(1/(p−1)), scaled by the largest entry so that it cannot overflow."""
        top = gain.amax(1, keepdim=True).clamp_min(torch.finfo(gain.dtype).tiny)
        slope = gain / top
        return slope if self.p == 2 else slope ** (1 / (self.p - 1))

    def _level(self, slope: Tensor, room: Tensor, eps: Tensor) -> Tensor:
        """Return t with Σ min(t·slope, room)^p = ε^p; infinite if the walls stop all before."""
        unit = eps.clamp_min(torch.finfo(eps.dtype).tiny)  # powers of ε could overflow
        cap = torch.where(slope > 0, room / slope, torch.inf) / unit[:, None]
        return eps * level(slope**self.p, cap**self.p, torch.ones_like(eps)) ** (1 / self.p)

    def _fewest(self, gain: Tensor, room: Tensor | None, eps: Tensor) -> Tensor:
        """Return the maximiser u for p = 0: to the wall wherever that gains most."""
        worth = None if room is None else torch.where(gain > 0, gain * room, 0)
        if room is None or worth is None or bool(worth.isinf().any()):
            raise InputError("p = 0 bounds no change by itself: give the threat lower and upper")
        return torch.where(largest(worth, eps.floor()), room, 0)

    def _filled(self, gain: Tensor, room: Tensor | None, eps: Tensor) -> Tensor:
        """Return the maximiser u for 1 < p < ∞."""
        slope = self.slope(gain)
        if room is None:
            norm = row_norm(slope, self.p)
            return slope * torch.where(norm > 0, eps / norm, 0)[:, None]
        spends = (slope > 0) & (eps > 0)[:, None]
        wish = torch.where(spends, self._level(slope, room, eps)[:, None] * slope, 0)
        return torch.minimum(wish, room)

    def _price(self, gain: Tensor, room: Tensor, eps: Tensor) -> Tensor:
        """Return the dual point for 1 ≤ p < ∞: what the budget is worth where a wall stops u."""
        if self.p == 1:
            by_gain, order = gain.sort(1, descending=True)
            spent = room.gather(1, order).cumsum(1)
            k = (spent < eps[:, None]).sum(1, keepdim=True)
            price = by_gain.gather(1, k.clamp(max=gain.shape[1] - 1))
            return torch.where(k < gain.shape[1], price, 0)
        t = self._level(self.slope(gain), room, eps)[:, None]
        top = gain.amax(1, keepdim=True)
        price = top * (room / t) ** (self.p - 1)
        return torch.where(room.isinf() | price.isnan(), torch.inf, price)  # NaN: ε = 0


def parse_norm(text: str) -> float:
    """Read ``linf``, ``l2``, ``l1``, ``l0``, ``inf`` or a number."""
    try:
        return float(text.strip().lower().removeprefix("l"))
    except ValueError:
        raise InputError(f"the norm must be linf, l2, l1, l0 or a number; got {text!r}") from None


def _budget(eps: Any) -> float | Tensor:
    try:
        value = torch.as_tensor(eps, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"eps must be a number or one number per sample; got {eps!r}") from None
    if value.dim() > 1:
        raise InputError(f"eps must be a number or one per sample; its shape is {value.shape}")
    if not bool((value >= 0).all()) or bool(value.isinf().any()):
        raise InputError(f"eps must be finite and not negative; got {eps!r}")
    return value if value.dim() else float(value)


def _number_or_array(value: Any, name: str) -> float | Tensor | None:
    if value is None:
        return None
    tensor = _tensor.as_tensor(value, name).to(torch.float64)
    if bool(tensor.isnan().any()):
        raise InputError(f"{name} holds NaN")
    return tensor if tensor.dim() else float(tensor)


def _span(value: Any) -> str:
    if value is None:
        return "no wall"
    tensor = torch.as_tensor(value)
    low, high = float(tensor.min()), float(tensor.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
