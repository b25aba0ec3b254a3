"""A decoder as a function of flat tensors, which is what a graph can be traced from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefixkit.backbones.masks import causal_mask
from prefixkit.backbones.positions import has_alibi
from prefixkit.backbones.positions import takes_positions as takes_positions
from prefixkit.format.manifest import LayerGeometry
from prefixkit.injections import KeyValuePrefix


class FlatDecoder(nn.Module):
    """`(input_ids, attention_mask, position_ids, past) -> (logits, present key 0, present value 0, …)`.

    `past` lists the key and value of each layer, [batch, kv_heads, past, head_dim]; `attention_mask` is
    [batch, past + seq]. Logits are float32 whatever the model computes in.

    With `baked`, every row has that prefix before its past: past, present, mask and positions speak of the text only.
    """

    def __init__(
        self, model: PreTrainedModel, geometry: Sequence[LayerGeometry], baked: KeyValuePrefix | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.windows = _windows(model, geometry)
        self.positions = takes_positions(model)
        self.text_start = baked.positions.text_start if baked is not None else 0
        self.length = baked.length if baked is not None else 0
        for layer in range(len(geometry) if baked is not None else 0):
            assert baked is not None
            self.register_buffer(f"prefix_{layer}_key", baked.keys[layer].to(model.device, model.dtype))
            self.register_buffer(f"prefix_{layer}_value", baked.values[layer].to(model.device, model.dtype))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the model; see the class."""
        cache = self.cache(past)
        logits = self.model(**self.arguments(input_ids, attention_mask, position_ids, cache, past[0].dtype)).logits
        return (logits.float(), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    def cache(self, past: list[Tensor]) -> DynamicCache:
        """`past`, and the baked prefix before it, as the model takes them."""
        cache = DynamicCache()
        cache.layers = [self._layer(index, *past[2 * index : 2 * index + 2]) for index in range(len(past) // 2)]
        return cache

    def arguments(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: DynamicCache, dtype: torch.dtype
    ) -> dict[str, Any]:
        """What the model is called with; `dtype` is that of its attention scores."""
        if self.length:
            ones = attention_mask.new_ones(attention_mask.shape[0], self.length)
            attention_mask = torch.cat([ones, attention_mask], dim=-1)
        keywords = {"position_ids": position_ids + self.text_start} if self.positions else {}
        mask = self._mask(attention_mask, input_ids.shape[1], dtype)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
            **keywords,
        }

    def _layer(self, index: int, key: Tensor, value: Tensor) -> PastLayer:
        if not self.length:
            return PastLayer(key, value)
        return PastLayer(key, value, getattr(self, f"prefix_{index}_key"), getattr(self, f"prefix_{index}_value"))

    def _mask(self, attention_mask: Tensor, seq: int, dtype: torch.dtype) -> Any:
        if not self.windows:
            return attention_mask
        masks = {kind: causal_mask(attention_mask, seq, dtype, window) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


class PastLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache: keeps past and present, and shows attention a baked prefix before them."""

    def __init__(self, key: Tensor, value: Tensor, *prefix: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(key, value)
        self.keys, self.values, self.prefix = key, value, prefix

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        if not self.prefix:
            return self.keys, self.values
        batch = self.keys.shape[0]
        rows = [tensor.expand(batch, -1, -1, -1) for tensor in self.prefix]
        return torch.cat([rows[0], self.keys], dim=-2), torch.cat([rows[1], self.values], dim=-2)

    def get_seq_length(self) -> int:
        length: int = self.keys.shape[-2]
        return length + (self.prefix[0].shape[-2] if self.prefix else 0)


def _windows(model: PreTrainedModel, geometry: Sequence[LayerGeometry]) -> dict[str, int | None]:
    """The window of each kind of layer; empty for ALiBi models, which derive their biases from the plain mask."""
    if has_alibi(model.config):
        return {}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(geometry)
    return {kind: layer.window for kind, layer in zip(kinds, geometry, strict=True)}
