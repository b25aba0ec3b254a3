"""`--kv-cache int8`: keys and values that are kept in whole numbers of eight bits, each channel on a scale of its own.

How large a channel's numbers get is measured on tokens that the model draws and on others at random, at places all over
its context, since a channel that rotates slowly shows only there how large it is; with the prefix of the export and
without. What is larger than that in a text to come is cut to the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefixkit.backbones.cache_route import fill
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.errors import InputError
from prefixkit.injections import KeyValuePrefix
from prefixkit.serving.cache_scales import LARGEST, CacheScales, scale_names
from prefixkit.serving.prefix_table import Array

KINDS = ("int8",)
FILE = "onnx/cache.npz"
_TEXTS, _TOKENS, _SEED = 16, 64, 0
_ROOM = 1.2
"""How much larger than what was measured a number may be."""
_LEAST = 1e-3
"""Of a layer's largest number, what a channel has at least: one that was silent may yet speak."""
_UNBOUNDED = 4096
"""Positions that are looked at where there is no end."""
_MOST_LOST = 0.1
"""How much of their keys, or values, in a layer the texts themselves may lose beside a larger prefix."""


def measured_scales(decoder: Decoder, prefix: KeyValuePrefix | None) -> CacheScales:
    """What 1 is to stand for in keys and values of `decoder`, so that its own texts and `prefix` fit.

    Raises:
        InputError: a prefix so much larger than the texts that nothing of these would be left, or numbers without end.
    """
    model = decoder.release()
    texts = _kept(_written(decoder, model, None))
    both = [texts] if prefix is None else [texts, _kept(_written(decoder, model, prefix))]
    largest = [np.maximum.reduce([_largest(each) for each in same]) for same in zip(*both, strict=True)]
    room = [np.maximum(each, _LEAST * each.max()).clip(min=1e-12) * _ROOM for each in largest]
    scales = CacheScales(tuple((each / LARGEST).astype(np.float32) for each in room))
    where = "--kv-cache" if prefix is None else "--kv-cache, texts beside this prefix"
    scales.refuse_larger(where, texts, most=_MOST_LOST, next_step="leave it out")
    return scales


def _largest(tensor: Array) -> Array:
    """[kv_heads, 1, dim]: the largest absolute numbers of [kv_heads, slots, dim]."""
    found: Array = np.abs(tensor).max(axis=1, keepdims=True)
    return found


def _kept(cache: DynamicCache) -> list[Array]:
    """Key and value of each layer, [kv_heads, rows * slots, dim]."""
    kept = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    return [each.float().transpose(0, 1).flatten(1, 2).cpu().numpy() for each in kept]


@torch.no_grad()
def _written(decoder: Decoder, model: PreTrainedModel, prefix: KeyValuePrefix | None) -> DynamicCache:
    """The cache behind rows of which `model` has drawn the first half, all of which start with any token."""
    generator = torch.Generator(model.device).manual_seed(_SEED)
    words: dict[str, Any] = {"device": model.device, "generator": generator}
    size, half = model.config.get_text_config().vocab_size, _TEXTS // 2
    cache, start, given = DynamicCache(), 0, torch.randint(size, (_TEXTS, 1), **words)
    if prefix is not None:
        fill(cache, prefix, given, model.dtype)
        start = prefix.positions.text_start
    places = _places(decoder, start)
    for step in range(min(_TOKENS, (decoder.context_length or start + _TOKENS) - start)):
        mask = torch.ones(_TEXTS, cache.get_seq_length() + 1, dtype=torch.long, device=model.device)
        keywords = {"position_ids": (places + step).to(model.device)} if takes_positions(model) else {}
        logits = model(input_ids=given, attention_mask=mask, past_key_values=cache, use_cache=True, **keywords).logits
        newest = torch.multinomial(_shares(logits[:, -1], model.config.model_type), 1, generator=generator)
        given = torch.cat([newest[:half], torch.randint(size, (_TEXTS, 1), **words)[half:]])
    return cache


def _shares(logits: Tensor, where: str) -> Tensor:
    if not torch.isfinite(logits).all():
        step = "leave --kv-cache out, or export another prefix"
        raise InputError(where, expected="finite logits, to measure keys and values", found="others", next_step=step)
    return logits.float().softmax(-1)


def _places(decoder: Decoder, start: int) -> Tensor:
    """[rows, 1]: the position id at which each row begins, all over the context."""
    last = max(start, (decoder.context_length or _UNBOUNDED) - _TOKENS)
    return torch.linspace(start, last, _TEXTS).long()[:, None]


def save_scales(scales: CacheScales, path: Path) -> None:
    """Write the file that serving reads."""
    np.savez(path, **dict(zip(scale_names(len(scales.tensors) // 2), scales.tensors, strict=True)))  # type: ignore[arg-type]


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
    def __init__(self, scales: Sequence[Array]) -> None:
        super().__init__()
        self.scales = [torch.from_numpy(scale) for scale in scales]

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        rounded = [
            from_eight_bits(in_eight_bits(new, scale.to(new.device)), scale.to(new.device), new)
            for new, scale in zip((key_states, value_states), self.scales, strict=True)
        ]
        kept: tuple[Tensor, Tensor] = super().update(*rounded, *rest, **more)
        return kept
