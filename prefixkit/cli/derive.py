"""What the commands of prefix algebra share: reading their inputs, moving keys, and saying what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from prefixkit.cli.onto_itself import refuse_own_input

if TYPE_CHECKING:
    from prefixkit.algebra import Derived, Rotation
    from prefixkit.prefix import Prefix


def read(inputs: Sequence[Path], output: Path, command: str) -> list[Prefix]:
    """The prefixes that `command` makes `output` of.

    Raises:
        ConfigError: `output` is one of them.
        FormatError: one of them is no prefix file.
    """
    from prefixkit.prefix import load

    refuse_own_input(output, inputs, command)
    return [load(path) for path in inputs]


def rotations_of(
    backbone: str | None, prefixes: Sequence[Prefix], command: str, *, moved: bool = True
) -> tuple[Rotation, ...] | None:
    """How the keys of `backbone` turn; None without a backbone, or where `prefixes` have no keys that do.

    Args:
        moved: whether any slot will stand elsewhere; if not, the backbone is only compared.

    Raises:
        ConfigError: prefixes that no backbone would help to move; it is read only behind this.
        MismatchError: they were made for another one.
        BackboneError: it cannot be used, or turns its keys in a way that cannot be undone.
    """
    if backbone is None:
        return None
    from prefixkit.algebra.slots import refuse_unmovable, slots_of, turns
    from prefixkit.backbones.load import find_folder, load_decoder
    from prefixkit.backbones.rotation import rotations
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.format.match import check, facts, folder_facts

    slots = [slot for prefix in prefixes for slot in slots_of(prefix, command)]
    if moved:
        refuse_unmovable(prefixes[0], command)
    quiet_transformers()
    prefix = prefixes[0]
    where = f"prefix for {prefix.manifest.backbone.name} on {backbone}"
    check(where, facts(prefix.manifest.backbone), folder_facts(find_folder(backbone, None)))
    if not moved or not any(turns(prefix, record) for record, _ in slots):
        return None
    return rotations(load_decoder(backbone))


def write(made: Derived, output: Path, parents: Sequence[Path]) -> None:
    """Save what was made, and tell its size, its notes and what is next."""
    from prefixkit.prefix import save

    prefix = save(made.prefix, output)
    lengths = dict.fromkeys(str(record.length) for record in prefix.manifest.injections if record.length is not None)
    slots = f" ({' and '.join(lengths)} slots)" if lengths else ""
    typer.echo(f"wrote {output}{slots} from {', '.join(map(str, parents))}")
    for note in made.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"next: prefixkit inspect {shlex.quote(str(output))}")
