"""A prefix as the beginning of a `transformers` cache: no hook on the model, any attention implementation.

    cache = dynamic_cache([a, b], model)
    model.generate(**text_behind([a, b], model, **tokens), past_key_values=cache, max_new_tokens=40)

A cache grows while text is written: make one for each call. `prefixkit.attach` counts padding out of sliding windows
and has room in every cache; what a cache cannot hold is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from prefixkit.backbones.geometry import windows
from prefixkit.backbones.positions import has_alibi, takes_positions
from prefixkit.backbones.weights import is_pair
from prefixkit.bridges.transformers_rows import Prefixes, rows_of
from prefixkit.errors import BackboneError, ConfigError
from prefixkit.injections import KeyValuePrefix, injection, positions_of
from prefixkit.prefix import Prefix


def dynamic_cache(
    prefixes: Prefixes, model: PreTrainedModel, *, batch: int = 1, beams: int = 1, allow_mismatch: bool = False
) -> DynamicCache | EncoderDecoderCache:
    """A cache that begins with a prefix, or in each row with another; `text_behind` says how text goes on.

    Shorter prefixes are filled up on the left. An encoder-decoder (BART, T5) gets a cache of its decoder.

    Args:
        model: a decoder, or an encoder-decoder for a prefix of its decoder that takes positions, as PEFT's do.
        batch: rows, where one prefix is for all of them.
        beams: of the beam search that the cache is for; `generate` does not widen a cache that it is given.
        allow_mismatch: take a file that was made for other weights, as long as the shapes fit.

    Raises:
        BackboneError: the model cannot have this prefix in its cache, or has one attached already.
        MismatchError: other layers or shapes than the model's, or another backbone.
    """
    rows = rows_of(prefixes, model, batch, allow_mismatch)
    if is_pair(model.config):
        return EncoderDecoderCache(_filled(DynamicCache(), rows, model, beams), DynamicCache())
    return _filled(DynamicCache(config=model.config), rows, model, beams)


def static_cache(
    prefixes: Prefixes,
    model: PreTrainedModel,
    max_cache_len: int,
    *,
    batch: int = 1,
    beams: int = 1,
    allow_mismatch: bool = False,
) -> StaticCache:
    """`dynamic_cache` of a fixed size, for `torch.compile` and `torch.export`.

    Args:
        max_cache_len: slots of the longest prefix and of the text, padding and what is written included.

    Raises:
        BackboneError, MismatchError: see `dynamic_cache`; or an architecture that cannot use static caches.
        ConfigError: no room behind the prefix.
    """
    where = model.config.model_type
    if is_pair(model.config) or has_alibi(model.config):
        kind = "an encoder-decoder" if is_pair(model.config) else "ALiBi"
        step = "use dynamic_cache"
        raise BackboneError(where, expected="a model that reads a static cache", found=kind, next_step=step)
    rows = rows_of(prefixes, model, batch, allow_mismatch)
    if max_cache_len <= (longest := max(row.length for row in rows if row is not None)):
        expected = f"max_cache_len above {longest}, the length of the prefix"
        raise ConfigError("static_cache", expected=expected, found=str(max_cache_len))
    return _filled(StaticCache(config=model.config, max_cache_len=max_cache_len), rows, model, beams)


def text_behind(
    prefixes: Prefixes, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What `model` and `generate` are to be given beside the cache: tokens, the mask over prefix and text, positions.

    Args:
        input_ids: [batch, seq], padded on the left to generate, on either side otherwise.
        attention_mask: [batch, seq], 1 at tokens; without it all are.

    Raises:
        BackboneError: padding under a sliding window, which counts slots: it would push the prefix out.
        ConfigError: another number of rows than prefixes.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if is_pair(model.config):
        return {"input_ids": input_ids, "attention_mask": mask}
    if any(windows(model.config)) and not mask.all():
        expected, step = "text without padding under a sliding window", "use prefixkit.attach, or rows of one length"
        raise BackboneError(model.config.model_type, expected=expected, found="padding", next_step=step)
    rows = [prefixes] * len(input_ids) if isinstance(prefixes, Prefix) else list(prefixes)
    if len(rows) != len(input_ids):
        raise ConfigError("text_behind", expected=f"{len(rows)} rows, one a prefix", found=str(len(input_ids)))
    injected = [None if row is None else injection(row) for row in rows]
    lengths = torch.tensor([0 if one is None else one.length for one in injected], device=mask.device)
    starts = torch.tensor([0 if one is None else positions_of(one).text_start for one in injected], device=mask.device)
    slots = torch.arange(int(lengths.max()), device=mask.device)
    own = (slots >= len(slots) - lengths[:, None]).to(mask.dtype)
    text = {"input_ids": input_ids, "attention_mask": torch.cat([own, mask], dim=1)}
    if takes_positions(model):
        text["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0) + starts[:, None]
    return text


def _filled(cache: Any, rows: Sequence[KeyValuePrefix | None], model: PreTrainedModel, beams: int) -> Any:
    longest = max(row.length for row in rows if row is not None)

    def stacked(parts: Sequence[Tensor | None]) -> Tensor:
        empty = next(part for part in parts if part is not None)[:, :0]
        own = [empty if part is None else part for part in parts]
        rows = torch.stack([F.pad(part, (0, 0, longest - part.shape[1], 0)) for part in own])
        return rows.to(model.device, model.dtype).repeat_interleave(beams, dim=0)

    for layer in range(len(next(row for row in rows if row is not None).keys)):
        key = stacked([None if row is None else row.keys[layer] for row in rows])
        value = stacked([None if row is None else row.values[layer] for row in rows])
        cache.update(key, value, layer)
    return cache
