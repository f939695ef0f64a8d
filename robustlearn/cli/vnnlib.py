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
    comparisons of two outputs, or of one with a number. Disjuncts of equal boxes are one query, and
    of an empty box, l > u, none. An answer is `sat` if any of them is.

    Parameters
    ----------
    shape : of one input; outputs : how many there are.

    Raises
    ------
    InputError for a file that says anything else, for inputs without both bounds, and where every
    box is empty.
    """
    name = Path(path).name
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is no text: unpack it if it is compressed") from None
    terms = _terms(text, name)
    asserted = []
    for term in terms:
        if term[:1] == ["assert"] and len(term) == 2:
            asserted.append(term[1])
        elif term[:1] != ["declare-const"]:
            raise InputError(f"{name}: expected declare-const and assert; got {_text(term)}")
    queries: dict[tuple[Any, ...], list[list[tuple[Any, float]]]] = {}
    for disjunct in _disjuncts(["and", *asserted], name):
        box: Box = {}
        rows = [row for a in disjunct if (row := _read(a, box, outputs, name)) is not None]
        if all(low <= high for low, high in box.values()):
            queries.setdefault(tuple(sorted(box.items())), []).append(rows)
    if not queries:
        raise InputError(f"{name}: no input is asked for: each lower bound exceeds an upper one")
    return [(_region(dict(box), shape, name), _rule(rows, name)) for box, rows in queries.items()]


def _text(term: Any) -> str:
    return f"({' '.join(map(_text, term))})" if isinstance(term, list) else str(term)


def _terms(text: str, name: str) -> list[Any]:
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
                raise InputError(f"{name}: a bracket is closed that was not opened")
        else:
            stack[-1].append(token)
    if len(stack) > 1:
        raise InputError(f"{name}: a bracket is not closed: is the file whole?")
    return whole


def _disjuncts(term: Any, name: str) -> list[list[Any]]:
    """Return the conjunctions of comparisons that the term is a disjunction of."""
    head, *rest = term if isinstance(term, list) and term else [None]
    if head == "or":
        return [found for part in rest for found in _disjuncts(part, name)]
    if head == "and":
        parts = itertools.product(*(_disjuncts(part, name) for part in rest))
        return [list(itertools.chain(*part)) for part in parts]
    if head not in ("<=", ">=") or len(rest) != 2:
        raise InputError(f"{name}: expected (<= a b) or (>= a b); got {_text(term)}")
    return [[term]]


def _read(term: list[Any], box: Box, outputs: int, name: str) -> tuple[Any, float] | None:
    """Take a bound of an input into the box, or return a row of outputs with row·y + c ≤ 0."""
    less, more = (_operand(side, name) for side in term[1:])
    if term[0] == ">=":
        less, more = more, less
    if "X" in (less[0], more[0]):
        _bound(less, more, box, f"{name}: {_text(term)}")
        return None
    row, offset = torch.zeros(outputs, dtype=torch.float64), 0.0
    for sign, (kind, value) in ((1.0, less), (-1.0, more)):
        if not kind:
            offset += sign * value
        elif value < outputs:
            row[int(value)] += sign
        else:
            raise InputError(f"{name} speaks of Y_{value}; the network has {outputs} outputs")
    return row, offset


def _operand(side: Any, name: str) -> tuple[str, float]:
    """Return X or Y and which of them, or "" and a number."""
    if isinstance(side, str) and re.fullmatch(r"[XY]_\d+", side):
        return side[0], int(side[2:])
    try:
        number = float(side)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name}: expected X_i, Y_i or a finite number; got {_text(side)}")
    return "", number


def _bound(less: tuple[str, float], more: tuple[str, float], box: Box, where: str) -> None:
    if less[0] and more[0]:
        raise InputError(f"{where} relates an input to another value; only numbers are known")
    index = int((less if less[0] else more)[1])
    low, high = box.get(index, (-math.inf, math.inf))
    box[index] = (low, min(high, more[1])) if less[0] else (max(low, less[1]), high)


def _region(box: Box, shape: tuple[int, ...], name: str) -> Region:
    size = math.prod(shape)
    bounds = [box.get(index, (-math.inf, math.inf)) for index in range(size)]
    low, high = torch.tensor(bounds, dtype=torch.float64).reshape(size, 2).unbind(1)
    wide = (~(low.isfinite() & high.isfinite())).nonzero().flatten().tolist()
    if wrong := sorted(set(box) - set(range(size))) or wide:
        raise InputError(
            f"{name}: each of the {size} inputs needs two bounds, and no other; see X_{wrong[0]}"
        )
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
