"""The shape of every layer's keys and values, measured on the model rather than guessed from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry

_ATTENTION = {"full_attention", "sliding_attention"}
_WANTED = "a decoder in which every layer keeps keys and values"
_SOFT_PROMPT = "a soft prompt (input vectors) is what such a model can take"
_ANOTHER = "use a decoder such as Llama or GPT-2"


_ENCODER_DECODERS = ("bart", "t5")
"""The families of encoder-decoders that the tests hold to an independent computation."""
_OF_IMAGES = ("vit", "deit", "dinov2", "dinov2_with_registers")
"""The same of encoders of images."""


def refuse_untried(config: PreTrainedConfig, where: str) -> None:
    """Refuse, before any weight is read, encoder-decoders of other families than were tested.

    Raises:
        BackboneError: another family, or a decoder that nobody says how to begin.
    """
    if config.model_type not in _ENCODER_DECODERS:
        expected, step = f"a decoder, or an encoder-decoder of {' or '.join(_ENCODER_DECODERS)}", "use one of these"
        raise BackboneError(where, expected=expected, found=config.model_type, next_step=step)
    if getattr(config, "decoder_start_token_id", None) is None:
        raise BackboneError(where, expected="decoder_start_token_id in config.json", found="none")


def refuse_untried_images(config: PreTrainedConfig, where: str) -> None:
    """Refuse, before any weight is read, encoders of images of other families than were tested.

    Prompts stand behind a class token, and heads read it: not every family has one, and Swin's layers read windows.

    Raises:
        BackboneError: another family.
    """
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and config.model_type not in _OF_IMAGES:
        expected = f"an encoder of images of the family {' or '.join(_OF_IMAGES)}"
        raise BackboneError(where, expected=expected, found=config.model_type, next_step="use one of these")


def refuse_unsupported(config: PreTrainedConfig, where: str) -> None:
    """Refuse, before any weight is read, what is no decoder whose layers keep plain keys and values.

    Raises:
        BackboneError: encoder-decoders, encoders, multimodal models, latent attention (MLA), hybrids with state-space,
            linear-attention or convolution layers, state-space models.
    """
    obstacle = _obstacle(config)
    if obstacle is not None:
        reason, step = obstacle
        raise BackboneError(where, expected=_WANTED, found=f"{config.model_type}: {reason}", next_step=step)


def _obstacle(config: PreTrainedConfig) -> tuple[str, str] | None:
    other = ", ".join(sorted(set(_layer_kinds(config)) - _ATTENTION))
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder", "use a decoder; `prefixkit train` and `prefixkit eval` take encoder-decoders too"
    if config.get_text_config() is not config:
        return "a multimodal model", "give a folder with its language model alone"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention, whose cache is a compressed latent", _SOFT_PROMPT
    if other:
        return f"{other} layers (a hybrid or state-space model)", _SOFT_PROMPT
    if not getattr(config, "num_attention_heads", None):
        return "no attention heads (a recurrent model)", _SOFT_PROMPT
    if is_encoder(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "no causal language model", _ANOTHER
    return None


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
    token = one_token(model)
    with evaluating(model):
        model(input_ids=token, attention_mask=torch.ones_like(token), past_key_values=cache, use_cache=True)
    layers = getattr(cache, "layers", [])
    config = model.config
    if len(layers) != config.num_hidden_layers:
        found = (
            f"{config.model_type}: {len(layers)} of {config.num_hidden_layers} (layers share them, or it has no cache)"
        )
        raise BackboneError(where, expected="keys and values in every layer", found=found, next_step=_ANOTHER)
    return tuple(_layer(layer, window, where) for layer, window in zip(layers, windows(config), strict=True))


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model with this configuration reads its input as a whole, in both directions, and writes none."""
    # Some encoders can be made decoders and are listed as both; some decoders say `is_decoder=False`.
    reads = type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return reads and not getattr(config, "is_decoder", False) and not getattr(config, "is_encoder_decoder", False)


def looks_back(model: PreTrainedModel) -> bool:
    """Whether no token of a decoder sees what follows it; EmbeddingGemma's do."""
    return all(getattr(module, "is_causal", True) for module in model.modules())


def reader_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that reads: its decoder, or the encoder below whatever head it has."""
    # Some models (OPT) call their decoder directly; some encoders call the last layer of their head a decoder.
    read: PreTrainedModel = model.base_model if is_encoder(model.config) else model.get_decoder()
    return read


def one_input(model: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest input of `model`: one token, or one image."""
    if model.main_input_name != "pixel_values":
        return {"input_ids": one_token(model)}
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width, device=model.device)}


def one_token(model: PreTrainedModel) -> Tensor:
    """[1, 1]: the shortest input."""
    # Weights that accelerate keeps elsewhere look as if they were on "meta"; it moves inputs itself.
    device = "cpu" if hasattr(model, "_hf_hook") else model.device
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
