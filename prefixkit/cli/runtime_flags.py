"""A flag for every runtime of the catalogue, on the commands that carry prefixes to or from one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

import typer

from prefixkit.bridges.catalogue import RUNTIMES
from prefixkit.errors import ConfigError

_COUNTS = ("none", "one", "two", "three")


def flags(attribute: str) -> dict[str, str]:
    """The flags of the rows that have an `attribute` (`writes` or `reads`): parameter name to what the help says."""
    return {row.name.replace("-", "_"): getattr(row, attribute) for row in RUNTIMES if getattr(row, attribute)}


def with_flags(attribute: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give the function of a command, whose `**runtimes` stand for them, the flags of every row with `attribute`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = [_parameter(name, help) for name, help in flags(attribute).items()]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *made]}
        command.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str, help: str) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", help=f"{help[0].upper()}{help[1:]}.")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def one_of(command: str, given: Mapping[str, Any], expected: str) -> str:
    """The name of the one flag that was given, as the catalogue spells it. Raises ConfigError for none or several."""
    names = [name.replace("_", "-") for name, on in given.items() if on]
    if len(names) == 1:
        return names[0]
    step = "add " + ", ".join(f"--{name.replace('_', '-')}" for name in given)
    found = _COUNTS[len(names)] if len(names) < len(_COUNTS) else str(len(names))
    raise ConfigError(command, expected=expected, found=found, next_step=step)
