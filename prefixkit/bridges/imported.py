"""Keys and values, or vectors, that another runtime kept, as a prefix that is bound to a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prefixkit import __version__
from prefixkit.bridges.described import Described, refuse_other_kind, refuse_other_shapes, refuse_too_long
from prefixkit.errors import FormatError, MismatchError
from prefixkit.format import names
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, Manifest, Positions, Provenance
from prefixkit.prefix import Array, Prefix


def imported(source: Path, pairs: Sequence[tuple[Array, Array]], backbone: Described, *, runtime: str) -> Prefix:
    """The prefix with key and value [kv_heads, prefix, head_dim] of each layer; text starts right behind it.

    Args:
        runtime: where it comes from; the provenance says so.

    Raises:
        FormatError: NaN or Infinity.
        MismatchError: other layers or shapes than the backbone's, more rows in one layer than in another, or more of
            them than the backbone has positions.
        BackboneError: a window that would swallow the prefix.
    """
    from prefixkit.backbones.geometry import refuse_swallowed

    lengths = sorted({key.shape[1] for key, _ in pairs})
    if len(lengths) > 1:
        found = f"{lengths[0]} and {lengths[-1]}"
        raise MismatchError(source, expected="as many tokens in every layer", found=found)
    refuse_other_kind(source, backbone)
    refuse_other_shapes(source, [(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs], backbone)
    refuse_swallowed(backbone.decoder, lengths[0], str(source))
    refuse_too_long(source, lengths[0], backbone)
    refuse_not_finite(source, _tensors(pairs))
    return prefix_of(pairs, backbone.identity(), runtime=runtime)


def prefix_of(pairs: Sequence[tuple[Array, Array]], identity: BackboneIdentity, *, runtime: str) -> Prefix:
    """The same for a backbone of which the identity is known."""
    record = key_value_record(pairs[0][0].shape[1])
    provenance = Provenance(method="prompt-cache", prefixkit=__version__, config={"imported_from": runtime})
    return Prefix(Manifest(backbone=identity, injections=(record,), provenance=provenance), _tensors(pairs))


def key_value_record(length: int, *, frozen: int = 0) -> InjectionRecord:
    """Keys and values before the text of a decoder, of which the first `frozen` slots are not trained."""
    return InjectionRecord(
        kind="key_value_prefix",
        stack="decoder",
        attention="self",
        length=length,
        positions=Positions(text_start=length),
        frozen_slots=frozen,
    )


def prompt_record(length: int, *, pair: bool) -> InjectionRecord:
    """Vectors before the text of a decoder, or before that of the encoder of an encoder-decoder (`pair`)."""
    return InjectionRecord(
        kind="embedding_prompt",
        stack="encoder" if pair else "decoder",
        length=length,
        positions=Positions(text_start=length),
        placement="prepend",
    )


def refuse_not_finite(source: Path, tensors: Mapping[str, Array]) -> None:
    """Refuse NaN and Infinity, which no prefix file holds, with FormatError."""
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            expected, step = f"finite numbers for {name}", "its training diverged, or the file is damaged"
            raise FormatError(source, expected=expected, found="NaN or Infinity", next_step=step)


def _tensors(pairs: Sequence[tuple[Array, Array]]) -> dict[str, Array]:
    tensors = {}
    for layer, (key, value) in enumerate(pairs):
        tensors[names.key("decoder", "self", layer)] = np.ascontiguousarray(key)
        tensors[names.value("decoder", "self", layer)] = np.ascontiguousarray(value)
    return tensors
