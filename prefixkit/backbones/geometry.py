"""The shape of every layer's keys and values, measured on the model rather than guessed from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry

SOFT_PROMPT = "a soft prompt (input vectors) is what such a model can take"
_ATTENTION = {"full_attention", "sliding_attention"}


def refuse_unsupported(config: PreTrainedConfig, where: str) -> None:
    """Refuse, before any weight is read, architectures whose layers keep no plain keys and values.

    Raises:
        BackboneError: latent attention (MLA), hybrids with state-space, linear-attention or convolution layers,
            state-space models, encoder-decoders and encoders.
    """
    expected = "a decoder in which every layer keeps keys and values"
    if getattr(config, "kv_lora_rank", None):
        raise _refusal(config, where, expected, "multi-head latent attention, whose cache is a compressed latent")
    other = sorted(set(_layer_kinds(config)) - _ATTENTION)
    if other:
        raise _refusal(config, where, expected, f"a hybrid with {', '.join(other)} layers")
    if not getattr(config, "num_attention_heads", None):
        raise _refusal(config, where, expected, "a model without attention heads (a state-space model)")
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(config, where, expected, "an encoder-decoder", "use a decoder-only backbone with this version")


def _refusal(
    config: PreTrainedConfig, where: str, expected: str, reason: str, then: str = SOFT_PROMPT
) -> BackboneError:
    return BackboneError(where, expected=expected, found=f"{config.model_type}: {reason}", next_step=then)


def _layer_kinds(config: PreTrainedConfig) -> list[str]:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    return ["full_attention" if kind == "attention" else str(kind) for kind in kinds]


def windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer in tokens, None for full attention.

    Raises:
        BackboneError: a sliding layer without a stated window.
    """
    window = getattr(config, "sliding_window", None)
    kinds = _layer_kinds(config)
    if not kinds:
        return [window] * config.num_hidden_layers
    if "sliding_attention" in kinds and window is None:
        raise BackboneError("config.json", expected="sliding_window for its sliding layers", found="none")
    return [window if kind == "sliding_attention" else None for kind in kinds]


@torch.no_grad()
def measure(model: PreTrainedModel, where: str) -> tuple[LayerGeometry, ...]:
    """Run one token through `model` and read each layer's geometry off the cache it fills.

    Raises:
        BackboneError: a layer keeps something else than one key and one value per token.
    """
    cache: Any = DynamicCache()
    with evaluating(model):
        model(input_ids=one_token(model), past_key_values=cache, use_cache=True)
    layers = getattr(cache, "layers", [])
    config = model.config
    if len(layers) != config.num_hidden_layers:
        found = f"{len(layers)} layers of keys and values for {config.num_hidden_layers} layers (shared between layers)"
        raise _refusal(config, where, "keys and values in every layer", found)
    return tuple(_layer(layer, window, where) for layer, window in zip(layers, windows(config), strict=True))


def one_token(model: PreTrainedModel) -> Tensor:
    """[1, 1]: the shortest input."""
    # Weights that accelerate keeps elsewhere look as if they were on "meta"; it moves inputs itself.
    device = "cpu" if model.device.type == "meta" else model.device
    return torch.zeros(1, 1, dtype=torch.long, device=device)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in eval mode for the length of a `with` block: no dropout, no random numbers, no checkpointing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _layer(layer: Any, window: int | None, where: str) -> LayerGeometry:
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if key is None or value is None or key.ndim != 4 or key.shape[2] != 1 or value.shape[:3] != key.shape[:3]:
        shape = None if key is None else tuple(key.shape)
        raise BackboneError(where, expected="keys [1, kv_heads, 1, head_dim] in each layer", found=f"{shape}")
    return LayerGeometry(kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3], window=window)


def refuse_swallowed(geometry: tuple[LayerGeometry, ...], length: int, where: str) -> None:
    """Refuse a prefix that a sliding window would hide from the very first token of the text.

    Raises:
        BackboneError: some layer's window is not longer than the prefix.
    """
    narrow = min((layer.window for layer in geometry if layer.window is not None), default=None)
    if narrow is not None and length >= narrow:
        raise BackboneError(
            where,
            expected=f"a prefix shorter than the sliding window of {narrow} tokens",
            found=f"a prefix of {length}, which the window would swallow before the text starts",
            next_step=f"use --length {max(1, narrow // 4)}",
        )
