"""A small vocabulary for saying what a JSON document must look like, which reports every problem with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_INTEGER = 2**53 - 1
"""The largest whole number that every JSON reader keeps exact."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: `pointer` is a JSON pointer (RFC 6901) into the manifest."""

    pointer: str
    message: str

    def __str__(self) -> str:
        return f"{self.pointer or '/'}: {self.message}"


Check = Callable[[str, Any], Iterator[Problem]]
"""Reports the problems of a value that lies at a pointer."""


def text(pattern: str | None = None, like: str = "text") -> Check:
    """A string, the whole of which matches `pattern`; `like` describes it."""

    def check(pointer: str, value: Any) -> Iterator[Problem]:
        if not isinstance(value, str) or (pattern is not None and not re.fullmatch(pattern, value, re.DOTALL)):
            yield expected(pointer, like, value)

    return check


def integer(least: int, most: int = LARGEST_INTEGER) -> Check:
    """A whole number, written without a fraction."""

    def check(pointer: str, value: Any) -> Iterator[Problem]:
        if type(value) is not int or not least <= value <= most:
            yield expected(pointer, f"a whole number of {least} or more", value)

    return check


def number(pointer: str, value: Any) -> Iterator[Problem]:
    """A number."""
    if type(value) not in (int, float):
        yield expected(pointer, "a number", value)


def boolean(pointer: str, value: Any) -> Iterator[Problem]:
    """`true` or `false`."""
    if type(value) is not bool:
        yield expected(pointer, "true or false", value)


def one_of(choices: Iterable[str]) -> Check:
    """One of some strings."""
    known = tuple(choices)

    def check(pointer: str, value: Any) -> Iterator[Problem]:
        if not isinstance(value, str) or value not in known:
            yield expected(pointer, " or ".join(map(repr, known)), value)

    return check


def array(item: Check, *, least: int = 0, unique: bool = False) -> Check:
    """A list whose entries pass `item`."""

    def check(pointer: str, value: Any) -> Iterator[Problem]:
        if not isinstance(value, list) or len(value) < least:
            yield expected(pointer, "a list" if least == 0 else f"a list of {least} or more", value)
            return
        for index, entry in enumerate(value):
            yield from item(f"{pointer}/{index}", entry)
        if unique and len(set(map(repr, value))) != len(value):
            yield Problem(pointer, "expected entries that differ; found one twice")

    return check


def mapping(item: Check, *, names: Iterable[str] | None = None, least: int = 0) -> Check:
    """An object with free keys, or some of `names`, whose values pass `item`."""
    known = None if names is None else tuple(names)

    def check(pointer: str, value: Any) -> Iterator[Problem]:
        if not isinstance(value, dict) or len(value) < least:
            yield expected(pointer, "an object" if least == 0 else "an object that is not empty", value)
            return
        for key, entry in value.items():
            if known is not None and key not in known:
                yield unknown(pointer, key, known)
            else:
                yield from item(below(pointer, key), entry)

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with all of `required`, perhaps some of `optional`, and nothing else."""
    known = {**required, **(optional or {})}

    def check(pointer: str, value: Any) -> Iterator[Problem]:
        if not isinstance(value, dict):
            yield expected(pointer, "an object", value)
            return
        for key in required:
            if key not in value:
                yield Problem(pointer, f"expected the field {key!r}; found none")
        for key, entry in value.items():
            if key in known:
                yield from known[key](below(pointer, key), entry)
            else:
                yield unknown(pointer, key, known)

    return check


def below(pointer: str, key: str) -> str:
    """The pointer to `key` inside the object at `pointer`."""
    return f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


def expected(pointer: str, like: str, value: Any) -> Problem:
    """The problem of a value that is not what it should be."""
    shown = repr(value)
    return Problem(pointer, f"expected {like}; found {shown if len(shown) <= 60 else shown[:57] + '…'}")


def unknown(pointer: str, key: str, known: Iterable[str]) -> Problem:
    """The problem of a key that the specification does not have."""
    return Problem(pointer, f"expected only {', '.join(known)}; found {key[:60]!r}")
