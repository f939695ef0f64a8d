"""Named collections from which the command line, the tests and the report draw."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from robustlearn.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """One registered function, the first line of its docstring, and facts about it."""

    name: str
    function: Callable[..., Any]
    summary: str
    facts: Mapping[str, Any]


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Read a name and its options; numbers and truth values as such, all else as text.

    Examples
    --------
    >>> parsed("pgd:steps=20:loss=dlr")
    ('pgd', {'steps': 20, 'loss': 'dlr'})
    """
    name, *given = text.strip().split(":")
    options: dict[str, Any] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"write options as name:key=value; got {text!r}")
        if key in options:
            raise InputError(f"{text!r} gives {key} twice; keep one")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be; ``ends`` tell by ``[`` and ``]`` which bounds belong."""

    low: float
    high: float
    ends: str
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Tell whether a value is a number of the range."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        number, closed = float(value), {"[": self.low, "]": self.high}
        return self.low < number < self.high or number in [closed.get(end) for end in self.ends]

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


COUNT = Range(1, math.inf, "[)", whole=True)
NATURAL = Range(0, math.inf, "[)", whole=True)
POSITIVE = Range(0, math.inf, "()")
NOT_NEGATIVE = Range(0, math.inf, "[)")
SHARE = Range(0, 1, "(]")
UNIT = Range(0, 1, "[]")
TIME = Range(0, math.inf, "[]")  # in seconds
FINITE = Range(-math.inf, math.inf, "()")


def check_options(name: str, options: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise an InputError that names the option, its range and the value; None is a default.

    Examples
    --------
    >>> check_options("pgd", {"steps": 0}, {"steps": COUNT})
    Traceback (most recent call last):
    robustlearn.errors.InputError: pgd: steps must be a whole number in [1, inf); got 0
    """
    for option, value in options.items():
        allowed = ranges.get(option)
        if allowed is not None and value is not None and not allowed.holds(value):
            raise InputError(f"{name}: {option} must be {allowed}; got {value!r}")


class Registry(Mapping[str, Entry]):
    """Functions of one kind by name, in order of registration.

    Examples
    --------
    >>> greetings = Registry("greeting")
    >>> @greetings.register("hello", polite=True)
    ... def hello():
    ...     '''Say hello.'''
    >>> greetings["hello"].summary, greetings["hello"].facts["polite"]
    ('Say hello.', True)
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, **facts: Any) -> Callable[[Function], Function]:
        """Return a decorator that files a function under ``name``."""

        def decorate(function: Function) -> Function:
            if name in self._entries:
                raise KeyError(f"a {self.kind} named {name!r} is registered already")
            summary = (function.__doc__ or "").strip().split("\n", 1)[0]
            self._entries[name] = Entry(name, function, summary, facts)
            return function

        return decorate

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(self._entries)
            raise InputError(
                f"there is no {self.kind} named {name!r}; there are: {known}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def chosen(registry: Registry, text: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that a text names, and the options that it gives, checked.

    A function's options are its parameters with defaults; their ranges the fact ``ranges`` of its
    entry.

    Raises
    ------
    InputError for a name or an option that there is not, and a value out of its range.

    Examples
    --------
    >>> greetings = Registry("greeting")
    >>> @greetings.register("hello", ranges={"times": COUNT})
    ... def hello(name, *, times=1):
    ...     return times * f"hello {name} "
    >>> function, options = chosen(greetings, "hello:times=2")
    >>> function("you", **options)
    'hello you hello you '
    """
    if not isinstance(text, str):
        raise InputError(f"{registry.kind}: expected a name with options as text; got {text!r}")
    name, options = parsed(text)
    entry = registry[name]
    parameters = inspect.signature(entry.function).parameters
    known = [key for key, p in parameters.items() if p.default is not p.empty]
    if strangers := sorted(set(options) - set(known)):
        has = ", ".join(known) or "none"
        raise InputError(f"{name} has no option {', '.join(strangers)}; it has: {has}")
    check_options(name, options, entry.facts.get("ranges", {}))
    return entry.function, options
