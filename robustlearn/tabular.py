"""Threats for rows of features: integers, categories, features that only rise, fall or stand."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn._tensor import column, flat
from robustlearn.errors import InputError
from robustlearn.threats import ROUNDING, LpBall

AHEAD = 0.1  # the fraction of a whole step from which an attack on its way looks a step ahead
COLUMNS = ("feature", "type", "mutable", "min", "max")


@dataclass(frozen=True, eq=False)
class Tabular(LpBall):
    r"""{δ : ‖(δⱼ/scaleⱼ)ⱼ, (cost_G·½‖δ_G‖₁)_G‖_p ≤ eps, x + δ is a row that may exist}.

    A row may exist if it lies in the box, its integer features are integers, each group of
    one-hot columns holds exactly one 1, and no feature moved against its direction. A group
    counts as one coordinate of the norm: another category costs ``cost``, whichever it is.

    Parameters
    ----------
    p, eps, lower, upper, mask, scale : as for `LpBall`; p is 1, 2 or ∞. ``mask`` False on a
        one-hot column: that category can be neither entered nor left.
    integer : (d,) bool, True where the feature is an integer.
    groups : the column numbers of each one-hot group.
    cost : what another category costs: a number, or one per group. The ``scale`` of one-hot
        columns is 2/cost, whatever is given.
    direction : (d,) of −1 (may only fall), 0, 1 (may only rise); None for both ways everywhere.

    Notes
    -----
    Each operation works on coordinates: the other features, and per group the weight t that
    moves from the present category to another. There the set without its integrality is an
    `LpBall`, its walls drawn in to the last integer and to t ≤ 1. ``support`` is the maximum over
    that relaxation, hence an upper bound; for p = ∞ the walls do all, and it is exact. ``argmax``
    attains it, ``project`` leads to the larger ball of `LpBall` with this scale, which contains
    the set, so that gradient steps may pass between members; ``sample``, ``restrict``, ``enclose``
    and ``land`` end on members, and ``contains`` knows members only. Attacks walk between members
    and take losses and gradients at the members that they ``land`` on.

    Examples
    --------
    >>> threat = Tabular(1, 2.0, integer=[True, False, False], groups=[(1, 2)], lower=0.0)
    >>> x = torch.tensor([[3.0, 1.0, 0.0]])
    >>> threat.enclose(x, torch.tensor([[4.4, 0.3, 0.6]]))    # one up, and the other category
    tensor([[4., 0., 1.]])
    >>> threat.support(torch.tensor([[1.0, 0.0, 3.0]]), x)    # 3 for the category, 1 for one up
    tensor([4.])
    """

    tight: ClassVar[bool] = False
    convex: ClassVar[bool] = False

    integer: Any = field(default=(), kw_only=True)
    groups: Any = field(default=(), kw_only=True)
    cost: Any = field(default=1.0, kw_only=True)
    direction: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (1, 2, float("inf")):
            raise InputError(f"a tabular threat knows p = 1, 2 and inf, not {self.p}")
        integer = _tensor.as_tensor(self.integer, "integer").bool()
        if integer.dim() != 1 or len(integer) == 0:
            raise InputError("integer must hold one bool per feature: True where it is an integer")
        d = len(integer)
        groups = tuple(tuple(int(j) for j in group) for group in self.groups)
        listed = [j for group in groups for j in group]
        if len(set(listed)) < len(listed) or any(not 0 <= j < d for j in listed):
            raise InputError(f"groups must hold different column numbers from 0 to {d - 1}")
        cost = torch.as_tensor(self.cost, dtype=torch.float64).expand(len(groups))
        if not bool((cost > 0).all()):
            raise InputError("the cost of another category must be positive")
        direction = _tensor.as_tensor([0] * d if self.direction is None else self.direction)
        if direction.shape != (d,) or not bool((direction.sign() == direction).all()):
            raise InputError(f"direction must hold -1, 0 or 1 for each of {d} features")
        if bool(direction[listed].any()):
            raise InputError("a one-hot column has no direction; use mask to forbid a category")
        given = 1.0 if self.scale is None else self.scale
        scale = torch.as_tensor(given, dtype=torch.float64).expand(d).clone()
        for group, price in zip(groups, cost, strict=True):
            scale[list(group)] = 2 / price
            integer[list(group)] = False
        for name, value in (
            ("integer", integer),
            ("groups", groups),
            ("cost", cost),
            ("direction", direction),
            ("scale", scale),
        ):
            object.__setattr__(self, name, value)

    # ------------------------------------------------------------------ the five operations

    def norm(self, delta: Tensor) -> Tensor:
        """‖(δⱼ/scaleⱼ)ⱼ, (cost_G·½‖δ_G‖₁)_G‖_p per sample; infinite where a frozen one moved."""
        rows = flat(delta)
        sizes = [rows[:, list(group)].abs().sum(1, keepdim=True) / 2 for group in self.groups]
        size = self._coordinates().norm(torch.cat([rows[:, self._rest()], *sizes], 1))
        frozen = self._frozen(delta)
        if frozen is None:
            return size
        return torch.where((frozen & (rows != 0)).any(1), torch.inf, size)

    def support(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """Upper bound of max ⟨g, δ⟩ over the set, per sample; attained for p = ∞.

        Without x, which can be left out where there is no box, that of the containing `LpBall`.
        """
        if x is None:
            return self._ball().support(g)
        gain, _ = self._collapse_direction(g, x)
        return self._coordinates(x, g).support(gain)

    def argmax(self, g: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the δ of the relaxation that attains `support`; a member for p = ∞."""
        if x is None:
            return self._ball().argmax(g)
        gain, rival = self._collapse_direction(g, x)
        moved = self._coordinates(x, g).argmax(gain)
        return self._expand(moved, rival, x).reshape(g.shape)

    def project(self, delta: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the nearest point of the `LpBall` that contains the set, in its walls."""
        if x is None:
            raise InputError("a tabular threat depends on the point: give x too")
        return super().project(delta, x)

    def inward(self, direction: Tensor, point: Tensor) -> Tensor:
        """Return a direction without the features at the wall it points at, or of another sense.

        What has moved in its sense goes back by projections only.
        """
        against = flat(direction) * self._on(self.direction, direction) < 0
        return self.relaxed().inward(direction.masked_fill(against, 0), point)

    def sample(
        self, like: Tensor, generator: torch.Generator | Tensor | int | None = None
    ) -> Tensor:
        """Return a random member's δ: uniform over the coordinates, rounded at random.

        Parameters and shapes as for `LpBall.sample`.
        """
        keys = _tensor.keys(generator, like)
        wide = like.double()
        cells = self._coordinates(wide)
        drawn = cells.sample(torch.zeros_like(cells.reach[0]), _tensor.fold(keys, 0))
        if self.groups:
            drawn[:, -len(self.groups) :].abs_()
        draw = _tensor.uniform(_tensor.fold(keys, 1), tuple(like.shape[1:]), torch.float64)
        _, rival = self._collapse_direction(draw, wide)
        threshold = _tensor.uniform(_tensor.fold(keys, 2), tuple(drawn.shape[1:]), torch.float64)
        return self._landed(like, drawn, rival, threshold) - like

    # ------------------------------------------------------------------ points and checks

    def enclose(self, x: Tensor, point: Tensor) -> Tensor:
        """Return a member next to ``point``; it, where allowed.

        A group goes to the rival category of most weight if that has more than the present
        one (t ≥ ½), and integers are rounded. If that costs more than ε, the coordinates are
        projected, cut to whole steps towards x, and what the cuts give back buys further
        steps, those first that come nearer to ``point`` per budget. Feasible without tolerance;
        nearest for p = ∞.

        Returns
        -------
        (n, *shape) in the dtype of ``x``.
        """
        return self._next_to(x, point, 0.5)

    def _next_to(self, x: Tensor, point: Tensor, threshold: float) -> Tensor:
        """Return a member next to ``point``, up where a fraction reaches ``threshold``."""
        wide, wish = x.double(), flat(point.double())
        rival = self._rivals(wish, wide)
        weight = [
            (1 + wish.gather(1, to) - wish.gather(1, self._category(wide, group))) / 2
            for group, to in zip(self.groups, rival, strict=True)
        ]
        coordinates = torch.cat([(wish - flat(wide))[:, self._rest()], *weight], 1)
        landed = self._landed(x, coordinates, rival, torch.full_like(coordinates, threshold))
        direct = point.to(x.dtype)
        return torch.where(column(self.contains(x, direct), x), direct, landed)

    def relaxed(self) -> LpBall:
        """Return the ball that contains the set, with one-hot columns between 0 and 1."""
        d = len(self.integer)
        lower, upper = (
            torch.as_tensor(fall if wall is None else wall, dtype=torch.float64).expand(d).clone()
            for wall, fall in ((self.lower, -torch.inf), (self.upper, torch.inf))
        )
        grouped = list(self._grouped())
        lower[grouped], upper[grouped] = lower[grouped].clamp(min=0), upper[grouped].clamp(max=1)
        return replace(self._ball(), lower=lower, upper=upper)

    def land(self, x: Tensor, point: Tensor) -> Tensor:
        """Return the member that ``point`` heads for: `enclose`, but up from a tenth of a step on.

        So that an ascent of short steps meets members before it is half a step away from x.
        """
        return self._next_to(x, point, AHEAD)

    def span(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value allowed to every coordinate.

        As `LpBall.span`, with the last integers and the categories that can be paid.
        """
        low, high = self._ball().span(x)
        sense = self.direction.to(x.device)
        low, high = torch.where(sense > 0, x, low), torch.where(sense < 0, x, high)
        fall, rise = self._reach(x.double())
        steps = self.integer.to(x.device, copy=True)
        steps[list(self._grouped())] = True
        bottom, top = ((x + part.reshape(x.shape)).to(x.dtype) for part in (fall, rise))
        return torch.where(steps, bottom, low), torch.where(steps, top, high)

    def contains(self, x: Tensor, point: Tensor) -> Tensor:
        """Tell for each sample, in float64 and without tolerance, whether ``point`` is a member."""
        moved = flat(point.double() - x.double())
        back = (moved * self._on(self.direction, moved) < 0).any(1)
        return super().contains(x, point) & self._exists(point) & ~back

    def check(self, x: Tensor) -> None:
        """Raise an InputError if the batch does not fit: as `LpBall`, and rows that may exist."""
        if x.dim() != 2 or x.shape[1] != len(self.integer):
            raise InputError(
                f"this threat is for rows of {len(self.integer)} features; x has shape "
                f"{tuple(x.shape)}"
            )
        super().check(x)
        strange = (~self._exists(x)).nonzero().squeeze(1)
        if len(strange):
            raise InputError(
                f"{len(strange)} of {len(x)} rows (first: {strange[:5].tolist()}) hold a fraction "
                "in an integer feature, or not exactly one 1 in a one-hot group; give the "
                "threat in the units of x, before any scaling"
            )

    def tied(self, chosen: Tensor) -> Tensor:
        """Return the chosen features, and all columns of the groups they belong to."""
        chosen = chosen.clone()
        for group in self.groups:
            columns = list(group)
            chosen[:, columns] = chosen[:, columns].any(1, keepdim=True)
        return chosen

    def describe(self) -> dict[str, Any]:
        """Return the threat as plain data for a report."""
        return super().describe() | {
            "type": "Tabular",
            "integer": self.integer.tolist(),
            "groups": [list(group) for group in self.groups],
            "cost": self.cost.tolist(),
            "direction": self.direction.tolist(),
        }

    def __str__(self) -> str:
        """Name the threat in a few words."""
        kinds = f"{int(self.integer.sum())} integers, {len(self.groups)} one-hot groups"
        return f"{super().__str__()}, {kinds}"

    # ------------------------------------------------------------------ coordinates

    def _ball(self) -> LpBall:
        """Return the ball that contains the set."""
        walls = {"lower": self.lower, "upper": self.upper}
        return LpBall(self.p, self.eps, **walls, mask=self.mask, scale=self.scale)

    def _rest(self) -> Tensor:
        """Return the columns outside all groups."""
        return torch.tensor([j for j in range(len(self.integer)) if j not in self._grouped()])

    def _grouped(self) -> set[int]:
        return {j for group in self.groups for j in group}

    def _coordinates(self, x: Tensor | None = None, like: Tensor | None = None) -> "_Coordinates":
        """Return the relaxation, around x with its walls."""
        scale = torch.cat([self.scale[self._rest()], 1 / self.cost])
        reach = None
        if x is not None:
            fall, rise = self._reach(x.double())
            able = [rise[:, list(group)].amax(1, keepdim=True) for group in self.groups]
            rest = self._rest()
            fall = torch.cat([fall[:, rest], *[torch.zeros_like(part) for part in able]], 1)
            reach = (fall, torch.cat([rise[:, rest], *able], 1))
        return _Coordinates(self.p, self.eps, scale=scale, reach=reach)

    def _whole(self) -> Tensor:
        """Tell which coordinates move in whole steps."""
        return torch.cat([self.integer[self._rest()], torch.ones(len(self.groups)).bool()])

    def _category(self, x: Tensor, group: tuple[int, ...]) -> Tensor:
        """Return the column (n, 1) of the present category."""
        columns = torch.tensor(group, device=x.device)
        return columns[flat(x)[:, columns].argmax(1)][:, None]

    def _rivals(self, score: Tensor, x: Tensor) -> list[Tensor]:
        """Return for each group the column (n, 1) of the best other category that is open."""
        _, rise = self._walls(x, x)
        found = []
        for group in self.groups:
            columns = torch.tensor(group, device=x.device)
            closed = rise[:, columns] < 1
            best = score[:, columns].masked_fill(closed, -torch.inf).argmax(1)
            found.append(columns[best][:, None])
        return found

    def _collapse_direction(self, g: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return g per coordinate, for a group the gain max g_b − g_a ≥ 0 of category a at x."""
        rows, wide = flat(g), x.double()
        rival = self._rivals(rows, wide)
        gains = [
            (rows.gather(1, to) - rows.gather(1, self._category(wide, group))).clamp(min=0)
            for group, to in zip(self.groups, rival, strict=True)
        ]
        return torch.cat([rows[:, self._rest()], *gains], 1), rival

    def _expand(self, moved: Tensor, rival: list[Tensor], x: Tensor) -> Tensor:
        """Return coordinates as a change of columns, (n, d)."""
        rest = self._rest()
        delta = torch.zeros_like(flat(x), dtype=moved.dtype)
        delta[:, rest] = moved[:, : len(rest)]
        shares = moved[:, len(rest) :].split(1, dim=1) if self.groups else ()
        for group, to, share in zip(self.groups, rival, shares, strict=True):
            own = self._category(x, group)
            delta.scatter_(1, to, share).scatter_add_(1, own, -share)
        return delta

    def _walls(self, like: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `LpBall`, drawn in to integers and directions; one-hot columns stay in [0, 1]."""
        walls = super()._walls(like, x)
        if walls is None or x is None:
            if x is None:
                return walls  # type: ignore[return-value]
            walls = torch.full_like(flat(like), -torch.inf), torch.full_like(flat(like), torch.inf)
        fall, rise = walls
        whole, sense = (part.to(like.device) for part in (self.integer, self.direction))
        fall = torch.where(whole, fall.ceil(), fall).masked_fill(sense > 0, 0)
        rise = torch.where(whole, rise.floor(), rise).masked_fill(sense < 0, 0)
        for group in self.groups:
            columns = list(group)
            present = flat(x)[:, columns] > 0.5
            leaves = (present & (fall[:, columns] <= -1)).any(1, keepdim=True)
            enters = ~present & (rise[:, columns] >= 1) & leaves
            leaves = present & enters.any(1, keepdim=True)
            fall[:, columns], rise[:, columns] = -leaves.to(fall), enters.to(rise)
        return fall, rise

    def _reach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the walls (n, d) around x, drawn in to what ε alone can pay, in float64."""
        fall, rise = self._walls(x, x)
        eps, units = self._eps(x)[:, None], self._on(self.scale, x)
        steps = (eps * units * (1 + ROUNDING)).floor()
        steps = steps - (steps / units > eps).to(x)  # as `contains` measures it
        reach = torch.where(self.integer.to(x.device), steps.nan_to_num(0), eps * units)
        for group, cost in zip(self.groups, self.cost, strict=True):
            reach[:, list(group)] = (1 / (1 / cost) <= eps).to(x)  # as `norm` measures it
        return torch.maximum(fall, -reach), torch.minimum(rise, reach)

    # ------------------------------------------------------------------ members

    def _exists(self, point: Tensor) -> Tensor:
        """Tell which rows hold integers where they must, and one category per group."""
        rows = flat(point)
        whole = rows[:, self.integer.to(rows.device)]
        exists = (whole == whole.round()).all(1)
        for group in self.groups:
            columns = rows[:, list(group)]
            exists &= ((columns == 0) | (columns == 1)).all(1) & (columns.sum(1) == 1)
        return exists

    def _landed(self, x: Tensor, wish: Tensor, rival: list[Tensor], threshold: Tensor) -> Tensor:
        """Return the member next to ``wish``, coordinates around x; see `enclose`."""
        wide = x.double()
        cells, whole = self._coordinates(wide), self._whole().to(x.device)
        wish = wish.clamp(*cells.reach)
        rounded = torch.where(whole, _rounded(wish, threshold), wish)
        direct = self._placed(x, rounded, rival)
        inside = self.contains(x, direct)
        if bool(inside.all()):
            return direct
        bought = self._placed(x, cells.bought(wish, whole, threshold), rival)
        landed = torch.where(column(self.contains(x, bought), x), bought, x)
        return torch.where(column(inside, x), direct, landed)

    def _placed(self, x: Tensor, moved: Tensor, rival: list[Tensor]) -> Tensor:
        """Return x + δ for coordinates in whole steps, every other one rounded towards x."""
        wide = x.double()
        delta = self._expand(moved, rival, wide).reshape(x.shape)
        point = (wide + delta).to(x.dtype)
        over = (point.double() - wide).abs() > delta.abs()
        return torch.where(over, torch.nextafter(point, x), point).clamp(*self.span(x))


@dataclass(frozen=True, eq=False)
class _Coordinates(LpBall):
    """The relaxation around given points: an `LpBall` whose walls are known per sample."""

    reach: Any = field(default=None, kw_only=True)

    def _walls(self, like: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.reach is None:
            return None
        fall, rise = self.reach
        return fall.to(like.dtype), rise.to(like.dtype)

    def bought(self, wish: Tensor, whole: Tensor, threshold: Tensor) -> Tensor:
        """Project, cut to whole steps, and buy steps with what that saved, best value first."""
        inner = _Coordinates(self.p, self.eps * (1 - ROUNDING), scale=self.scale, reach=self.reach)
        nearest = inner.project(wish)
        nearest = torch.where(whole, nearest.trunc(), nearest)
        budget = self._eps(wish)[:, None] ** self.p * (1 - 2 * ROUNDING)
        sense, units = wish.sign(), self._on(self.scale, wish)
        for _ in range(3):
            size = nearest.abs()
            price = ((size + 1) / units) ** self.p - (size / units) ** self.p
            left = budget - ((size / units).nan_to_num(0) ** self.p).sum(1, keepdim=True)
            lack = wish.abs() - size
            wanted = whole & (lack > threshold) & (price <= left)
            value = torch.where(wanted, (2 * lack - 1) / price, -torch.inf)
            order = value.argsort(dim=1, descending=True)
            paid = torch.where(wanted, price, 0).gather(1, order).cumsum(1) <= left
            bought = torch.zeros_like(wanted).scatter(1, order, paid) & wanted
            nearest = nearest + bought * sense
        return nearest


def _rounded(wish: Tensor, threshold: Tensor) -> Tensor:
    """Return whole numbers: up in size where the fraction reaches its threshold."""
    size = wish.abs()
    return wish.sign() * (size.floor() + (size - size.floor() >= threshold))


def from_table(table: Any, p: float, eps: Any, *, columns: Sequence[str] | None = None) -> Tabular:
    """Return the threat that a table of features describes: ε is a share of each one's range.

    δⱼ is counted in units of maxⱼ − minⱼ, and x + δ stays between min and max.

    Parameters
    ----------
    table : data frame, or path of a CSV file, a row a feature: ``feature``; ``type``, "int",
        "real", or "ohe" with the number of its one-hot group ("ohe0"); ``mutable``; ``min``,
        ``max``; and, where given, ``direction`` (−1, 0 or 1). Another category costs 1.
    p, eps : as for `LpBall`.
    columns : the features of x in order; by default those of the table.

    Raises
    ------
    InputError for a table that lacks a column or a feature, or holds an unknown type or word.

    Examples
    --------
    >>> import pandas
    >>> rows = [["age", "int", False, 0, 99], ["income", "real", True, 0, 1000]]
    >>> threat = from_table(pandas.DataFrame(rows, columns=list(COLUMNS)), 2, 0.1)
    >>> threat.enclose(torch.tensor([[40.0, 500.0]]), torch.tensor([[50.0, 700.0]])).round()
    tensor([[ 40., 600.]])
    """
    import pandas

    frame = table if isinstance(table, pandas.DataFrame) else pandas.read_csv(table)
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise InputError(f"the feature table lacks the columns {', '.join(missing)}")
    frame = frame.set_index("feature")
    if columns is not None:
        unknown = [name for name in columns if name not in frame.index]
        if unknown:
            raise InputError(f"the feature table does not know {', '.join(unknown[:5])}")
        frame = frame.loc[list(columns)]
    kinds = [str(kind) for kind in frame["type"]]
    strange = [kind for kind in kinds if kind not in ("int", "real") and kind[:3] != "ohe"]
    if strange:
        raise InputError(f"the type of a feature is int, real or ohe…; got {strange[0]!r}")
    if not frame["mutable"].isin([True, False]).all():  # "no" would count as true
        raise InputError("mutable must be True or False for every feature")
    names = sorted({kind for kind in kinds if kind.startswith("ohe")})
    low, high = (frame[name].to_numpy(float) for name in ("min", "max"))
    return Tabular(
        p,
        eps,
        lower=low,
        upper=high,
        mask=frame["mutable"].to_numpy(bool),
        scale=high - low,
        integer=[kind == "int" for kind in kinds],
        groups=[[j for j, kind in enumerate(kinds) if kind == name] for name in names],
        direction=frame["direction"].to_numpy(int) if "direction" in frame else None,
    )
