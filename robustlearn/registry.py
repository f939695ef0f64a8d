"""Named collections from which the command line, the tests and the report draw."""

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
