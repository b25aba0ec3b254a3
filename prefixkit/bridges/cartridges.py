"""HazyResearch's cartridges (Eyuboglu et al. 2025, arXiv 2506.06266), there and back, bit for bit.

A cartridge is what `torch.save` makes of a dict of four lists with a tensor [1, kv_heads, slots, head_dim] for each
layer: keys and values, of slots that training left alone (`frozen_keys`; `fixed_keys` in older files and in tokasaurus)
and of those that it changed (`trainable_keys`). The former stand first. An export writes both names, which share their
numbers. The file names no backbone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.cartridge_file import Lists, read_lists, write_lists
from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.bridges.described import described
from prefixkit.bridges.imported import imported
from prefixkit.bridges.in_words import RUNTIMES, of_whom
from prefixkit.errors import FormatError
from prefixkit.prefix import Array, Prefix

_TITLE = "HazyResearch's cartridges"
_PAGE = 16
"""Slots in a page of tokasaurus."""


def export_cartridge(prefix: Prefix, output: str | Path) -> Carried:
    """Write `prefix` as a file for `TrainableCache.from_pretrained` and for tokasaurus.

    Raises:
        FormatError: something besides keys and values before the text of a decoder, layers of different shapes.
        InputError: the file cannot be written.
    """
    pairs = keys_and_values(prefix, _TITLE)
    _refuse_uneven(prefix, pairs)
    length, frozen = pairs[0][0].shape[1], prefix.manifest.injections[0].frozen_slots or 0
    # Both readers want a frozen slot in every layer.
    fixed = max(1, frozen)
    write_lists(Path(output), _parts("frozen", pairs, 0, fixed) | _parts("trainable", pairs, fixed, length))
    return Carried(
        output=Path(output),
        next=f'cache = cartridges.cache.TrainableCache.from_pretrained("{output}")',
        lost=tuple(_lost(length, frozen)),
    )


def import_cartridge(source: str | Path, *, backbone: str | Path | None = None) -> Prefix:
    """The prefix in a file that `TrainableCache.save` wrote. Nothing in the file is run.

    Raises:
        FormatError: no such file, a file that would run code, other contents than a cartridge's, NaN or Infinity.
        BackboneError: no backbone, or one that cannot be used.
        MismatchError: other layers or shapes than the backbone's.
    """
    path = Path(source)
    lists = read_lists(path)
    pairs = [_joined(*layer) for layer in zip(*(lists[name] for name in _ORDER), strict=True)]
    prefix = imported(path, pairs, described(path, backbone=backbone), runtime="cartridges")
    (record,) = prefix.manifest.injections
    frozen = replace(record, frozen_slots=lists["frozen_keys"][0].shape[1])
    provenance = replace(prefix.manifest.provenance, method="cartridge")
    return Prefix(replace(prefix.manifest, injections=(frozen,), provenance=provenance), prefix.tensors)


_ORDER = ("frozen_keys", "trainable_keys", "frozen_values", "trainable_values")


def _parts(name: str, pairs: list[tuple[Array, Array]], start: int, stop: int) -> Lists:
    return {
        f"{name}_keys": [key[:, start:stop] for key, _ in pairs],
        f"{name}_values": [value[:, start:stop] for _, value in pairs],
    }


def _joined(fixed_key: Array, key: Array, fixed_value: Array, value: Array) -> tuple[Array, Array]:
    return np.concatenate([fixed_key, key], axis=1), np.concatenate([fixed_value, value], axis=1)


def _refuse_uneven(prefix: Prefix, pairs: list[tuple[Array, Array]]) -> None:
    shapes = sorted({str(array.shape) for pair in pairs for array in pair})
    if len(shapes) > 1:
        expected = f"one shape for all keys and values, as {_TITLE} have"
        raise FormatError(of_whom(prefix), expected=expected, found=" and ".join(shapes), next_step=RUNTIMES)


def _lost(length: int, frozen: int) -> Iterator[str]:
    if not frozen:
        yield "the format wants a frozen slot: slot 0 is written as one, which further training would leave alone"
    if length % _PAGE:
        rest = length % _PAGE
        yield (
            f"tokasaurus reads pages of {_PAGE} slots and would drop the last {rest} of {length}: serve it there only "
            f"with a length that is a multiple of {_PAGE}"
        )
