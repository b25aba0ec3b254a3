"""What the commands of prefix algebra share: reading their inputs, moving keys, and saying what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from prefixkit.algebra import Derived, Rotation
    from prefixkit.prefix import Prefix


def rotations_of(backbone: str | None, prefix: Prefix, *, moved: bool = True) -> tuple[Rotation, ...] | None:
    """How the keys of `backbone` turn; None without a backbone, or where `prefix` has no keys that do.

    Args:
        moved: whether any slot will stand elsewhere; if not, the backbone is only compared.

    Raises:
        MismatchError: `prefix` was made for another one.
        BackboneError: it cannot be used, or turns its keys in a way that cannot be undone.
    """
    if backbone is None:
        return None
    from prefixkit.algebra.slots import turns
    from prefixkit.backbones.load import find_folder, load_decoder
    from prefixkit.backbones.rotation import rotations
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.format.match import check, facts, folder_facts

    quiet_transformers()
    where = f"prefix for {prefix.manifest.backbone.name} on {backbone}"
    check(where, facts(prefix.manifest.backbone), folder_facts(find_folder(backbone, None)))
    if not moved or not any(turns(prefix, record) for record in prefix.manifest.injections):
        return None
    return rotations(load_decoder(backbone))


def write(made: Derived, output: Path, parents: Sequence[Path]) -> None:
    """Save what was made, and tell its size, its notes and what is next."""
    from prefixkit.prefix import save

    prefix = save(made.prefix, output)
    lengths = [record.length for record in prefix.manifest.injections if record.length is not None]
    slots = f" ({lengths[0]} slots)" if lengths else ""
    typer.echo(f"wrote {output}{slots} from {', '.join(map(str, parents))}")
    for note in made.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"next: prefixkit inspect {output}")
