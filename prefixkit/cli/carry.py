"""Carrying a prefix file into another runtime: the settings of the command line, and what stays behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit.bridges.catalogue import Runtime, chosen, function
from prefixkit.cli.onto_itself import refuse_own_input
from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    from prefixkit.bridges.carried import Carried
    from prefixkit.prefix import Prefix


def options_of(row: Runtime) -> set[str]:
    """The options of `export` that have an effect on the way to `row`."""
    needed = {"backbone": row.backbone, "dtype": "dtype" in row.settings, "set": bool(row.settings)}
    return {"json", *(name for name, has in needed.items() if has)}


def carry(
    row: Runtime, file: Path, output: Path, backbone: str | None, settings: Sequence[str], dtype: str | None
) -> Carried:
    """Write the prefix in `file` to `output` as `row` wants it.

    Args:
        backbone: given where `row` needs it, and only there.

    Raises:
        InputError: settings that `row` does not have, a file or prefix that does not go there.
    """
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.prefix import load

    assert row.exporter is not None
    given = chosen(row, _named(settings, dtype))
    if backbone is not None:
        given["backbone"] = backbone
    refuse_own_input(output, [file], f"export --{row.name}")
    quiet_transformers()
    prefix = load(file)
    done: Carried = function(row.exporter)(prefix, output, **given)
    return replace(done, lost=(*done.lost, *_unasked(row, prefix)))


def _named(settings: Sequence[str], dtype: str | None) -> dict[str, str]:
    """`--set` and `--dtype`, by name. Raises ConfigError for one that is no assignment, or given twice."""
    named = {} if dtype is None else {"dtype": dtype}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            step = "see `prefixkit runtimes`"
            raise ConfigError("--set", expected="name=value", found=repr(setting), next_step=step)
        if name in named:
            found = f"{named[name]} and {value}"
            raise ConfigError("--set", expected=f"{name} once", found=found, next_step="leave one out")
        named[name] = value
    return named


def _unasked(row: Runtime, prefix: Prefix) -> list[str]:
    """How to ask stays behind where a runtime has no place for it."""
    task = prefix.manifest.task
    if row.asks or task is None:
        return []
    how = f"template {task.input_template!r}, separator {task.separator!r}"
    return [f"{row.title} is not told how to ask ({how}): see `prefixkit inspect`"]
