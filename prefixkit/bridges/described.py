"""The backbone that something from another runtime is for: its configuration, and whether what was found fits it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ANOTHER = "give the backbone that it was made with"

Shape = tuple[int, int, int]
"""kv_heads, key_dim and value_dim of one layer."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A backbone of which the configuration was read, and no weights.

    Attributes:
        stacks: the layers of `decoder`, and of `encoder` where there is one.
        given: whether the user named it; else the other runtime did, and its weights need not be those in `place`.
    """

    place: Path
    name: str
    revision: str | None
    config: PreTrainedConfig
    stacks: Mapping[str, tuple[LayerGeometry, ...]]
    given: bool

    @property
    def decoder(self) -> tuple[LayerGeometry, ...]:
        """The layers that keep keys and values."""
        return self.stacks["decoder"]

    @property
    def is_pair(self) -> bool:
        """Whether it is an encoder-decoder."""
        return "encoder" in self.stacks

    def identity(self) -> BackboneIdentity:
        """Who it is; its weights are hashed where the user gave it, and unknown otherwise."""
        from prefixkit.backbones.identity import identify

        encoder = self.stacks.get("encoder", ())
        return identify(
            self.place, self.name, self.revision, self.config, self.decoder, encoder=encoder, weights=self.given
        )


def described(
    source: Path, *, backbone: str | Path | None, named: str | None = None, revision: str | None = None
) -> Described:
    """The backbone that the user gives, or else the one that the other runtime names.

    Args:
        source: what is imported, for messages.
        backbone, named: a folder or a hub id.
        revision: of `named`.

    Raises:
        BackboneError: it cannot be used, or none is given and the one that is named is not here.
    """
    from prefixkit.backbones.identity import local_folder
    from prefixkit.backbones.load import find_folder, sketch_stacks

    given = backbone is not None
    place = local_folder(named or "", revision) if backbone is None else find_folder(backbone, None)
    if place is None:
        found = f"a file that names {named[:80]}, which is not here" if named else "a file that names none"
        raise BackboneError(source, expected="the backbone", found=found, next_step="give it with --backbone")
    config, stacks = sketch_stacks(place)
    name = str(backbone if given else named)
    known = place.name if os.path.isdir(name) else name
    return Described(
        place=place, name=known, revision=None if given else revision, config=config, stacks=stacks, given=given
    )


def refuse_other_kind(source: Path, known: Described, *, pair: bool = False) -> None:
    """Refuse a decoder for what is an encoder-decoder's (`pair`), and the other way round, with MismatchError."""
    if known.is_pair != pair:
        expected, found = (f"a{'n encoder-' if one else ' '}decoder" for one in (pair, known.is_pair))
        raise MismatchError(source, expected=f"{expected} as backbone", found=found, next_step=ANOTHER)


def refuse_other_shapes(source: Path, found: Sequence[Shape], known: Described) -> None:
    """Refuse keys and values of other layers or shapes than the decoder's, with MismatchError.

    Of an encoder-decoder PEFT stores more layers than the decoder has; those behind are not looked at.
    """
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in known.decoder]
    if list(found[: len(expected)] if known.is_pair else found) != expected:
        wanted, had = (" and ".join(map(str, sorted(set(shapes)))) for shapes in (expected, found))
        expected_layers = f"the backbone's {len(expected)} layers of (kv_heads, key_dim, value_dim) {wanted}"
        raise MismatchError(source, expected=expected_layers, found=f"{len(found)} of {had}", next_step=ANOTHER)


def refuse_other_width(source: Path, width: int, known: Described) -> None:
    """Refuse input vectors of another width than the backbone's, with MismatchError."""
    hidden = known.config.hidden_size
    if width != hidden:
        expected = f"vectors of the backbone's width {hidden}"
        raise MismatchError(source, expected=expected, found=str(width), next_step=ANOTHER)


def refuse_too_long(source: Path, length: int, known: Described) -> None:
    """Refuse a prefix or a prompt behind which the backbone has no position for text, with MismatchError."""
    from prefixkit.backbones.identity import context_length

    context = context_length(known.config)
    if context is not None and length >= context:
        expected = f"fewer than the {context} positions of the backbone's context"
        raise MismatchError(source, expected=expected, found=str(length), next_step=ANOTHER)
