"""What a `transformers` cache holds, as a prefix: a context that was read once, or a prefix that was made elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from prefixkit import __version__
from prefixkit.backbones.attach import check_fits
from prefixkit.backbones.geometry import measure, refuse_unsupported
from prefixkit.backbones.snapshot import identity_of
from prefixkit.errors import BackboneError, ConfigError
from prefixkit.format.manifest import Manifest, Positions, Provenance, TaskRecord
from prefixkit.injections import KeyValuePrefix
from prefixkit.prefix import Prefix


@torch.no_grad()
def import_cache(
    cache: Cache,
    model: PreTrainedModel,
    *,
    row: int = 0,
    attention_mask: Tensor | None = None,
    text_start: int | None = None,
    task: TaskRecord | None = None,
) -> Prefix:
    """The prefix that a row of `cache` is, for the backbone that `model` was loaded from; `prefixkit.save` writes it.

    Args:
        cache: a DynamicCache or StaticCache that `model` filled, or one that begins with keys and values of its shape.
        row: of the batch.
        attention_mask: [batch, slots], 1 at what is kept: padding is left behind.
        text_start: where the text that follows starts counting; right behind what is kept by default.
        task: how text is written behind it.

    Raises:
        BackboneError: another cache, an empty one, one that has lost tokens to a sliding window, or a model from no
            folder.
        MismatchError: other layers or shapes than the model's.
        ConfigError: no such row, or a mask of another size.
    """
    where = model.config.model_type
    refuse_unsupported(model.config, where)
    kept = _kept(cache, row, attention_mask, where)
    layers = [_row(layer, row, kept, where) for layer in cache.layers]
    prefix = KeyValuePrefix(
        keys=tuple(key for key, _ in layers),
        values=tuple(value for _, value in layers),
        positions=Positions(text_start=len(kept) if text_start is None else text_start),
    )
    check_fits(model, prefix)
    manifest = Manifest(
        backbone=identity_of(model, measure(model, where)),
        injections=(prefix.record(),),
        provenance=Provenance(method="capture", prefixkit=__version__, config={"imported_from": "transformers"}),
        task=task,
    )
    return Prefix(manifest, prefix.arrays())


def _kept(cache: Cache, row: int, attention_mask: Tensor | None, where: str) -> Tensor:
    """The slots of `row` that hold tokens."""
    if not isinstance(cache, (DynamicCache, StaticCache)):
        found = type(cache).__name__
        raise BackboneError(where, expected="a DynamicCache or a StaticCache", found=found)
    length = int(cache.get_seq_length())
    if not length:
        raise BackboneError(where, expected="a cache that holds something", found="an empty one")
    rows = len(cache.layers[0].keys)
    if not 0 <= row < rows:
        raise ConfigError("import_cache", expected=f"a row of 0 to {rows - 1}", found=str(row))
    if attention_mask is None:
        return torch.arange(length)
    if attention_mask.shape != (rows, length):
        expected = f"attention_mask [{rows}, {length}], as the cache is"
        raise ConfigError("import_cache", expected=expected, found=str(list(attention_mask.shape)))
    kept = attention_mask[row].nonzero()[:, 0].cpu()
    if not len(kept):
        raise ConfigError(
            "import_cache", expected=f"an attention_mask that keeps something of row {row}", found="zeros"
        )
    return kept


def _row(layer: Any, row: int, kept: Tensor, where: str) -> tuple[Tensor, Tensor]:
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        raise BackboneError(where, expected="keys and values in every layer of the cache", found="a layer without")
    # A sliding layer keeps the end of the text only, and counts what it has seen.
    if key.shape[2] < int(layer.get_seq_length()):
        found = f"a layer that kept the last {key.shape[2]} of {int(layer.get_seq_length())}"
        step = "capture less than the sliding window, or a cache made with DynamicCache()"
        raise BackboneError(where, expected="a cache that holds every token", found=found, next_step=step)
    return key[row][:, kept.to(key.device)], value[row][:, kept.to(key.device)]
