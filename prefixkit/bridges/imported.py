"""Keys and values that another runtime kept, as a prefix that is bound to a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefixkit import __version__
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format import names
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, LayerGeometry, Manifest, Positions, Provenance
from prefixkit.prefix import Array, Prefix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Described:
    """A backbone of which the configuration was read.

    Attributes:
        given: whether the user named it; else the other runtime did, and its weights need not be those in `place`.
    """

    place: Path
    name: str
    config: PreTrainedConfig
    geometry: tuple[LayerGeometry, ...]
    given: bool


def described(source: Path, *, backbone: str | None, named: str | None = None) -> Described:
    """The backbone that the user gives, or else the one that the other runtime names.

    Args:
        source: what is imported, for messages.
        backbone, named: a folder or a hub id.

    Raises:
        BackboneError: it cannot be used, or none is given and the one that is named is not here.
    """
    from prefixkit.backbones.identity import local_folder
    from prefixkit.backbones.load import find_folder, sketch

    place = local_folder(named or "") if backbone is None else find_folder(backbone, None)
    if place is None:
        found = f"one for {named}, which is not here" if named else "a file that names none"
        raise BackboneError(source, expected="the backbone", found=found, next_step="give it with --backbone")
    config, geometry = sketch(place)
    name = str(backbone or named)
    return Described(place, place.name if Path(name).is_dir() else name, config, geometry, backbone is not None)


def imported(source: Path, pairs: Sequence[tuple[Array, Array]], backbone: Described, *, runtime: str) -> Prefix:
    """The prefix with key and value [kv_heads, prefix, head_dim] of each layer; text starts right behind it.

    Args:
        runtime: where it comes from; the provenance says so.

    Raises:
        MismatchError: other layers or shapes than the backbone's, or more rows in one layer than in another.
        BackboneError: a window that would swallow the prefix.
    """
    from prefixkit.backbones.geometry import refuse_swallowed
    from prefixkit.backbones.identity import identify

    lengths = sorted({key.shape[1] for key, _ in pairs})
    if len(lengths) > 1:
        found = f"{lengths[0]} and {lengths[-1]}"
        raise MismatchError(source, expected="as many tokens in every layer", found=found)
    _refuse_other_shapes(source, pairs, backbone.geometry)
    refuse_swallowed(backbone.geometry, lengths[0], str(source))
    identity = identify(backbone.place, backbone.name, None, backbone.config, backbone.geometry, weights=backbone.given)
    return prefix_of(pairs, identity, runtime=runtime)


def prefix_of(pairs: Sequence[tuple[Array, Array]], identity: BackboneIdentity, *, runtime: str) -> Prefix:
    """The same for a backbone of which the identity is known."""
    length = pairs[0][0].shape[1]
    record = InjectionRecord(
        kind="key_value_prefix",
        stack="decoder",
        attention="self",
        length=length,
        positions=Positions(text_start=length),
        frozen_slots=0,
    )
    provenance = Provenance(method="prompt-cache", prefixkit=__version__, config={"imported_from": runtime})
    tensors = {}
    for layer, (key, value) in enumerate(pairs):
        tensors[names.key("decoder", "self", layer)] = np.ascontiguousarray(key)
        tensors[names.value("decoder", "self", layer)] = np.ascontiguousarray(value)
    return Prefix(Manifest(backbone=identity, injections=(record,), provenance=provenance), tensors)


def _refuse_other_shapes(source: Path, pairs: Sequence[tuple[Array, Array]], geometry: Sequence[LayerGeometry]) -> None:
    found = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in geometry]
    if found != expected:
        wanted, had = (" and ".join(map(str, sorted(set(shapes)))) for shapes in (expected, found))
        raise MismatchError(
            source,
            expected=f"the backbone's {len(expected)} layers of (kv_heads, key_dim, value_dim) {wanted}",
            found=f"{len(found)} of {had}",
            next_step="give the backbone that it was made with",
        )
