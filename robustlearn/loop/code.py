"""Which code a network runs, as a hash that comments and layout do not change."""

import ast
import hashlib
import inspect
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
INSTALLED.add(Path(__file__).resolve().parents[1])  # in a checkout as elsewhere
OTHERS = sys.stdlib_module_names | {"torch"}  # whose versions a checkpoint names, or does not mind


def code_hash(kind: type) -> str | None:
    """Return a hash of the code of a class; None where its source is not known.

    Hashed are the syntax trees of the class and of all that it inherits from but torch's; of the
    functions and classes outside of installed libraries that these name; and so on. Numbers and
    words that stand in a module under such a name count by their values.
    """
    found: list[Any] = [one for one in kind.__mro__ if one.__module__.split(".")[0] not in OTHERS]
    digest = hashlib.sha256()
    for one in found:  # which grows
        tree = _tree(one)
        if tree is None and one is kind:
            return None
        if tree is None:
            continue
        digest.update(ast.dump(tree).encode())
        for value in _named(tree, _globals(one)):
            if _plain(value):
                digest.update(repr(value).encode())
            elif _own(value) and value not in found:
                found.append(value)
    return digest.hexdigest()[:8]


def _tree(thing: Any) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):  # typed in at a prompt, or made on the way
        return None


def _globals(thing: Any) -> dict[str, Any]:
    functions = [thing, *vars(thing).values()]
    return next((one.__globals__ for one in functions if isinstance(one, FunctionType)), {})


def _named(tree: ast.Module, known: dict[str, Any]) -> Iterator[Any]:
    """Yield what a piece of code reads from its module, and of modules that it names."""
    parts = list(ast.walk(tree))
    local = {part.arg for part in parts if isinstance(part, ast.arg)}
    local |= {p.id for p in parts if isinstance(p, ast.Name) and not isinstance(p.ctx, ast.Load)}
    read = known.keys() - local
    for part in parts:
        if isinstance(part, ast.Name) and part.id in read:
            yield known[part.id]
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            module = known.get(part.value.id)
            if isinstance(module, ModuleType) and part.attr in vars(module):
                yield vars(module)[part.attr]


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _own(value: Any) -> bool:
    """Tell whether a value is a function or class of a file outside of installed libraries."""
    if not isinstance(value, FunctionType | type):
        return False
    try:
        file = inspect.getsourcefile(value)
    except TypeError:
        return False
    return file is not None and INSTALLED.isdisjoint(Path(file).resolve().parents)
