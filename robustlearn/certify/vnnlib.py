"""Properties in VNN-LIB 1.0: a box of inputs, and what the outputs must not be in it."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import torch

from robustlearn.certify.complete import Property
from robustlearn.certify.relax import Region
from robustlearn.errors import InputError
from robustlearn.threats import LpBall

Box = dict[int, tuple[float, float]]
Query = tuple[Region, Property]


def read(path: str | Path, shape: tuple[int, ...], outputs: int) -> list[Query]:
    """Read a property: queries, each a box with the outputs that are wanted there.

    The assertions are brought into disjunctive form; each disjunct is a box, l ≤ X ≤ u, and linear
    comparisons of two outputs, or of one with a number. Disjuncts of equal boxes are one query. An
    answer is `sat` if any of them is.

    Parameters
    ----------
    shape : of one input; outputs : how many there are.

    Raises
    ------
    InputError for a file that says anything else, and for inputs without both bounds.
    """
    name, terms = Path(path).name, _terms(Path(path).read_text())
    asserted = [term[1] for term in terms if term[0] == "assert"]
    unknown = {term[0] for term in terms} - {"assert", "declare-const"}
    if unknown or not asserted:
        raise InputError(f"{name}: expected declare-const and assert; got {sorted(unknown)}")
    queries: dict[tuple[Any, ...], list[list[tuple[Any, float]]]] = {}
    for disjunct in _disjuncts(["and", *asserted]):
        box: Box = {}
        rows = [row for a in disjunct if (row := _read(a, box, outputs, name)) is not None]
        queries.setdefault(tuple(sorted(box.items())), []).append(rows)
    return [(_region(dict(box), shape, name), _rule(rows, name)) for box, rows in queries.items()]


def _terms(text: str) -> list[Any]:
    """Read S-expressions as nested lists."""
    whole: list[Any] = []
    stack = [whole]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text)):
        if token == "(":
            stack[-1].append([])
            stack.append(stack[-1][-1])
        elif token == ")":
            stack.pop()
            if not stack:
                raise InputError("a bracket is closed that was not opened")
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise InputError("a bracket is not closed: is the file whole?")
    return whole


def _disjuncts(term: list[Any]) -> list[list[Any]]:
    """Return the conjunctions of comparisons that the term is a disjunction of."""
    if term[0] == "or":
        return [found for part in term[1:] for found in _disjuncts(part)]
    if term[0] == "and":
        parts = itertools.product(*map(_disjuncts, term[1:]))
        return [list(itertools.chain(*part)) for part in parts]
    return [[term]]


def _read(term: list[Any], box: Box, outputs: int, name: str) -> tuple[Any, float] | None:
    """Take a bound of an input into the box, or return a row of outputs with row·y + c ≤ 0."""
    if len(term) != 3 or term[0] not in ("<=", ">="):
        raise InputError(f"{name}: expected (<= a b) or (>= a b); got {term}")
    less, more = term[1:] if term[0] == "<=" else reversed(term[1:])
    if "X_" in less + more:
        _bound(less, more, box, name)
        return None
    row, offset = torch.zeros(outputs, dtype=torch.float64), 0.0
    for sign, side in ((1.0, less), (-1.0, more)):
        if side.startswith("Y_"):
            if not int(side[2:]) < outputs:
                raise InputError(f"{name} speaks of {side}; the network has {outputs} outputs")
            row[int(side[2:])] += sign
        else:
            offset += sign * float(side)
    return row, offset


def _bound(less: str, more: str, box: Box, name: str) -> None:
    if less.startswith("X_") == more.startswith("X_"):
        raise InputError(f"{name} relates {less} and {more}; inputs are known by numbers alone")
    index = int((less if less.startswith("X_") else more)[2:])
    low, high = box.get(index, (-math.inf, math.inf))
    if less.startswith("X_"):
        high = min(high, float(more))
    else:
        low = max(low, float(less))
    box[index] = low, high


def _region(box: Box, shape: tuple[int, ...], name: str) -> Region:
    size = math.prod(shape)
    bounds = [box.get(index, (-math.inf, math.inf)) for index in range(size)]
    low, high = torch.tensor(bounds, dtype=torch.float64).reshape(size, 2).unbind(1)
    if set(box) - set(range(size)) or not bool((low.isfinite() & high.isfinite()).all()):
        raise InputError(
            f"{name}: each of the {size} inputs needs two bounds, and there are others"
        )
    if bool((low > high).any()):
        raise InputError(f"{name}: a lower bound exceeds an upper one")
    low, high = low.reshape(shape), high.reshape(shape)
    middle = ((low + high) / 2)[None]
    threat = LpBall(math.inf, 1.0, lower=low, upper=high, scale=high - low)
    return Region(middle, threat)


def _rule(groups: list[list[tuple[Any, float]]], name: str) -> Property:
    if not all(groups):
        raise InputError(f"{name} asks nothing of the outputs")
    most = max(map(len, groups))
    padded = [group + group[-1:] * (most - len(group)) for group in groups]
    rows = torch.stack([torch.stack([row for row, _ in group]) for group in padded])
    offsets = torch.tensor([[c for _, c in group] for group in padded], dtype=torch.float64)
    return Property(rows, offsets, closed=True)
