"""`--kv-cache int8`: keys and values that are kept in whole numbers of eight bits, each channel on a scale of its own.

How large a channel's numbers get is measured on what the model itself writes, at random, with the prefix of the export
and without. Newer keys and values that are larger than that are cut to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.serving.cache_scales import LARGEST, CacheScales, scale_names

KINDS = ("int8",)
FILE = "onnx/cache.safetensors"
_TEXTS, _TOKENS, _SEED = 8, 48, 0
_ROOM = 1.2
"""How much larger than what was measured a number may be."""
_LEAST = 1e-3
"""Of a layer's largest number, what a channel has at least: one that was silent may yet speak."""


def measured_scales(decoder: Decoder, prefix: KeyValuePrefix | None) -> CacheScales:
    """What 1 is to stand for in keys and values of `decoder`, so that its own texts and `prefix` fit."""
    model = decoder.release()
    room = (decoder.context_length or _TOKENS) - (0 if prefix is None else prefix.positions.text_start)
    kept = [_written(model, each, min(_TOKENS, room)) for each in ((None,) if prefix is None else (None, prefix))]
    largest = [torch.stack(each).amax(0) for each in zip(*map(_largest, kept), strict=True)]
    room_for = [torch.maximum(each, _LEAST * each.amax()).clamp(min=1e-12) * _ROOM for each in largest]
    return CacheScales(tuple((each / LARGEST).cpu().numpy() for each in room_for))


def _largest(cache: DynamicCache) -> Iterator[Tensor]:
    """[kv_heads, 1, dim] of key and value of each layer: the largest absolute numbers."""
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            yield kept.float().abs().amax(dim=(0, 2))[:, None]


@torch.no_grad()
def _written(model: PreTrainedModel, prefix: KeyValuePrefix | None, tokens: int) -> DynamicCache:
    """The cache behind texts that `model` has drawn, which start with any token."""
    generator = torch.Generator(model.device).manual_seed(_SEED)
    cache, start = _begun(model, prefix)
    words = {"device": model.device, "generator": generator}
    newest = torch.randint(model.config.get_text_config().vocab_size, (_TEXTS, 1), **words)
    for position in range(start, start + tokens):
        places = torch.full_like(newest, position)
        keywords = {"position_ids": places} if takes_positions(model) else {}
        mask = torch.ones(_TEXTS, cache.get_seq_length() + 1, dtype=torch.long, device=model.device)
        logits = model(input_ids=newest, attention_mask=mask, past_key_values=cache, use_cache=True, **keywords).logits
        newest = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=generator)
    return cache


def _begun(model: PreTrainedModel, prefix: KeyValuePrefix | None) -> tuple[DynamicCache, int]:
    cache = DynamicCache()
    if prefix is None:
        return cache, 0
    for layer, pair in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(*(each.to(model.device, model.dtype).expand(_TEXTS, -1, -1, -1) for each in pair), layer)
    return cache, prefix.positions.text_start


def save_scales(scales: CacheScales, path: Path) -> None:
    """Write the file that serving reads."""
    tensors = map(torch.from_numpy, scales.tensors)
    save_file(dict(zip(scale_names(len(scales.tensors) // 2), tensors, strict=True)), path)


def in_eight_bits(new: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [batch, kv_heads, seq, dim] in whole numbers of `scale` [kv_heads, 1, dim]."""
    return torch.clamp(torch.round(new.float() / scale), -LARGEST - 1, LARGEST).to(torch.int8)


def from_eight_bits(kept: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """What they stand for, in the dtype of `like`."""
    return (kept.float() * scale).to(like.dtype)


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """A cache of `transformers` that keeps what eight bits keep: what an export is compared with."""

    def __init__(self, scales: CacheScales) -> None:
        super().__init__()
        pairs = zip(scales.tensors[::2], scales.tensors[1::2], strict=True)
        self.layers = [_RoundedLayer(pair) for pair in pairs]


class _RoundedLayer(DynamicLayer):  # type: ignore[misc]
    def __init__(self, scales: Sequence[np.ndarray[Any, Any]]) -> None:
        super().__init__()
        self.scales = [torch.from_numpy(scale) for scale in scales]

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        rounded = [
            from_eight_bits(in_eight_bits(new, scale.to(new.device)), scale.to(new.device), new)
            for new, scale in zip((key_states, value_states), self.scales, strict=True)
        ]
        kept: tuple[Tensor, Tensor] = super().update(*rounded, *rest, **more)
        return kept
