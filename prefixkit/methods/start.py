"""The start that a user asks for, `--init KIND[:ARGUMENT]`, as far as methods share it."""

from __future__ import annotations

from typing import TypeVar

from prefixkit.errors import ConfigError
from prefixkit.injections import Injection, KeyValuePrefix, parts_of
from prefixkit.methods.catalogue import METHODS
from prefixkit.methods.method import Material

Kind = TypeVar("Kind", bound=Injection)


def words(material: Material, given: str) -> list[int]:
    """The tokens of the words that a user gave, or else of the training data, behind the BOS that the task promises."""
    tokens = material.tokenize(given) if given else material.words
    return [*([material.bos_id] if material.bos_id is not None else []), *tokens]


def from_parent(material: Material, file: str, length: int, kind: type[Kind]) -> Kind:
    """What a prefix file injects, of this kind and length.

    Raises:
        ConfigError: another kind or length, or keys and values in slots where there are none.
    """
    given = material.parent(file)
    held = (given,) if isinstance(given, kind) else parts_of(given)
    parent = next((part for part in held if isinstance(part, kind)), None)
    if parent is None:
        wanted, found = f"a file that holds a {kind.__name__}", f"a {type(given).__name__}"
        raise ConfigError("--init", expected=wanted, found=found)
    if parent.length != length:
        step = f"use --length {parent.length}"
        raise ConfigError("--init", expected=f"a prefix of {length} slots", found=f"{parent.length}", next_step=step)
    if isinstance(parent, KeyValuePrefix) and parent.placement == "slots" and not material.slots:
        found, step = "one in slots", "use the task that it was trained for"
        raise ConfigError("--init", expected="a prefix before the text", found=found, next_step=step)
    return parent


def unknown(method: str, init: str) -> ConfigError:
    """The refusal of a start that `method` does not know."""
    return ConfigError("--init", expected=" or ".join(METHODS[method].init), found=repr(init))
