"""Settings: frozen records that check the types and ranges of their own values, and are made from nested mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import PurePath
from typing import Any, get_args, get_type_hints

from prefixkit.errors import ConfigError
from prefixkit.spelling import did_you_mean

_LARGEST = 1e6
"""No learning rate, norm or decay beyond it makes sense, and arithmetic ends somewhere."""


def records(kind: type[Any], given: Any, where: str) -> list[Any]:
    """A `kind` of each mapping in the list `given`. Raises ConfigError, also for something else than such a list."""
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise ConfigError(where, expected="a list of tables", found=repr(given))
    return [record(kind, one, where) for one in given]


def record(kind: type[Any], given: Mapping[str, Any], where: str) -> Any:
    """A `kind` of the values in `given`; a mapping in the place of a record becomes that record.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    hints, known = get_type_hints(kind), [entry.name for entry in fields(kind)]
    made: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(where, expected="a known setting", found=repr(key), next_step=did_you_mean(key, known))
        nested = is_dataclass(hints[key]) and isinstance(value, Mapping)
        made[key] = (
            record(hints[key], value, f"{where} [{key}]") if nested else typed(value, hints[key], f"{where} {key}")
        )
    for entry in fields(kind):
        if entry.name not in made and entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(where, expected=f"--{entry.name.replace('_', '-')}", found="none")
    return kind(**made)


def check_types(settings: Any, section: str) -> None:
    """Check a record that was made in Python, in place; paths become strings and whole numbers floats."""
    for name, hint in get_type_hints(type(settings)).items():
        object.__setattr__(settings, name, typed(getattr(settings, name), hint, f"{section}{name}"))


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that `hint` names. Raises ConfigError."""
    accepted = get_args(hint) or (hint,)
    if float in accepted and type(value) is int:
        return float(value)
    if str in accepted and isinstance(value, PurePath):
        return str(value)
    if getattr(hint, "_is_protocol", False):
        fits = isinstance(value, hint)
    else:
        fits = type(value) in accepted
    if not fits:
        names = " or ".join(sorted(_told(kind) for kind in accepted if kind is not type(None)))
        raise ConfigError(where, expected=names, found=repr(value), next_step="see the settings of `prefixkit train`")
    return value


def _told(kind: type[Any]) -> str:
    if is_dataclass(kind):
        return f"a section of {', '.join(entry.name for entry in fields(kind))}"
    named: dict[type[Any], str] = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return named.get(kind, "a section of settings")


def one_of(where: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        step = did_you_mean(value, choices)
        raise ConfigError(where, expected=" or ".join(choices), found=repr(value), next_step=step)


def at_least(where: str, number: int | None, lowest: int) -> None:
    """Raise ConfigError for a number below `lowest`."""
    if number is not None and number < lowest:
        raise ConfigError(where, expected=f"at least {lowest}", found=str(number))


def positive(where: str, amount: float | None) -> None:
    """Raise ConfigError unless `amount` is a number above 0 that makes sense; None passes."""
    if amount is not None and not 0 < amount <= _LARGEST:
        raise ConfigError(where, expected=f"a positive number, at most {_LARGEST:g}", found=str(amount))


def not_negative(where: str, amount: float) -> None:
    """Raise ConfigError unless `amount` is 0 or a positive number that makes sense."""
    if not 0 <= amount <= _LARGEST:
        raise ConfigError(where, expected=f"from 0 to {_LARGEST:g}", found=str(amount))
