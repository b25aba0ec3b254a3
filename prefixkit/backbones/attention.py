"""The attention hook: a prefix in front of the keys and values of every layer, the model's own code untouched.

`transformers` lets attention functions be registered by name. Ours prepends the prefix and hands over to the function
that the model used before, so padding, caching, generation and gradient checkpointing stay what they were: the cache
holds the text only, and the prefix is there whenever attention runs.

The text's mask is the model's own. The prefix's columns of the mask are ours: a sliding window counts real tokens from
the prefix, whatever padding the cache holds in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefixkit.errors import BackboneError

_SLOT = "prefixkit_slot"
_NAME = "prefixkit_{}"


@dataclass
class Injected:
    """What the attention layers of one model see at the moment.

    Attributes:
        keys, values: one tensor a layer, [kv_heads, prefix, head_dim]; empty without a prefix.
        query_index: [batch, seq], how many real tokens of its row precede each query.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    query_index: Tensor | None = None


@dataclass(frozen=True)
class _Slot:
    injected: Injected
    layer: int


@dataclass
class AttentionRoute:
    """The hook on one model; `remove` gives the model back as it was."""

    model: PreTrainedModel
    injected: Injected = field(default_factory=Injected)
    previous: str = ""

    def install(self) -> None:
        """Point every attention layer at `injected`."""
        layers = attention_layers(self.model)
        self.previous = self.model.config._attn_implementation
        _register(self.previous, layers[0])
        for index, layer in enumerate(layers):
            setattr(layer, _SLOT, _Slot(self.injected, index))
        self.model.set_attn_implementation(_NAME.format(self.previous))

    def remove(self) -> None:
        """Restore the attention implementation that the model had."""
        for layer in attention_layers(self.model):
            delattr(layer, _SLOT)
        self.model.set_attn_implementation(self.previous)


def uses_registry(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through the registry of `transformers`; Falcon's and Bloom's does not."""
    return hasattr(sys.modules[type(attention_layers(model)[0]).__module__], "ALL_ATTENTION_FUNCTIONS")


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules in layer order.

    Raises:
        BackboneError: they cannot be told apart one to a layer.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "attention" in type(module).__name__.lower()
    ]
    found.sort(key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]
    if [module.layer_idx for module in found] != list(range(model.config.num_hidden_layers)):
        kinds = sorted({type(module).__name__ for module in found})
        raise BackboneError(
            model.config.model_type,
            expected=f"one attention module for each of its {model.config.num_hidden_layers} layers",
            found=f"{len(found)} ({', '.join(kinds)})",
        )
    return found


def _register(previous: str, layer: nn.Module) -> None:
    if previous == "eager":
        # Each modelling file has its own eager function (softcap, scaling); it is looked up when attention runs.
        AttentionInterface.register(_NAME.format(previous), _prefixed(_own_eager))
    else:
        AttentionInterface.register(_NAME.format(previous), _prefixed(_known(previous, layer)))
    AttentionMaskInterface.register(_NAME.format(previous), ALL_MASK_ATTENTION_FUNCTIONS[previous])


def _known(previous: str, layer: nn.Module) -> Callable[..., Any]:
    if previous not in ("sdpa",):
        raise BackboneError(
            type(layer).__name__,
            expected="attention implementation sdpa or eager under a prefix",
            found=previous,
            next_step="load the model with attn_implementation='sdpa'",
        )
    known: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[previous]
    return known


def _own_eager(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **keywords)


def _prefixed(attention: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> Any:
        slot: _Slot | None = getattr(module, _SLOT, None)
        if slot is None or not slot.injected.keys or slot.injected.keys[slot.layer].shape[-2] == 0:
            return attention(module, query, key, value, attention_mask, **keywords)
        window = keywords.get("sliding_window")
        mask = _with_prefix_columns(attention_mask, query, key, slot, window)
        key = torch.cat([_rows(slot.injected.keys[slot.layer], key), key], dim=2)
        value = torch.cat([_rows(slot.injected.values[slot.layer], value), value], dim=2)
        return attention(module, query, key, value, mask, **keywords)

    return forward


def _rows(prefix: Tensor, like: Tensor) -> Tensor:
    """[kv_heads, prefix, head_dim] -> [batch, kv_heads, prefix, head_dim], in the dtype and on the device of `like`."""
    return prefix.to(like.device, like.dtype).expand(like.shape[0], -1, -1, -1)


def _with_prefix_columns(
    mask: Tensor | None, query: Tensor, key: Tensor, slot: _Slot, window: int | None
) -> Tensor | None:
    length = slot.injected.keys[slot.layer].shape[-2]
    if mask is None:
        if query.shape[2] == 1 and window is None:
            return None
        mask = _causal(query, key)
    if window is None:
        return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    visible = _in_window(slot.injected.query_index, length, window)
    if mask.dtype != torch.bool:
        visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)
    batch = max(mask.shape[0], visible.shape[0])
    return torch.cat([visible.expand(batch, *mask.shape[1:3], -1), mask.expand(batch, -1, -1, -1)], dim=-1)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    return torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)


def _in_window(query_index: Tensor | None, length: int, window: int) -> Tensor:
    """[batch, 1, seq, prefix]: which slots lie within the window of each query; slot j stands at j, token i at length + i."""
    assert query_index is not None
    slots = torch.arange(length, device=query_index.device)
    distance = length + query_index[:, None, :, None] - slots
    return distance < window
