"""Real configurations as backbones without numbers: their shapes are measured on the `meta` device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig

from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.encoder_layers import measure_encoder
from prefixkit.backbones.vision import VisionEncoder
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.methods.method import Material


def encoder_of(config: PreTrainedConfig) -> Encoder:
    """An encoder of that configuration, of text with its language model's head."""
    text = hasattr(config, "vocab_size")
    kind: Any = AutoModelForMaskedLM if text else AutoModel
    with torch.device("meta"):
        options = {} if text else {"add_pooling_layer": False}
        model = kind.from_config(config, attn_implementation="eager", **options).eval()
    geometry = measure_encoder(model)
    identity = BackboneIdentity(
        name=config.model_type,
        family=config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=getattr(config, "vocab_size", 0),
        context_length=getattr(config, "max_position_embeddings", None),
        dtype="float32",
        config_hash=None,
        weights_hash=None,
        tokenizer_hash=None,
        stacks={"encoder": geometry},
    )
    return (Encoder if text else VisionEncoder)(model, Path(), identity, geometry)


def material(backbone: Encoder, *, writes: bool = False, seed: int = 0) -> Material:
    """What a method may ask for, without any data."""

    def none(asked: str) -> Any:
        raise AssertionError(asked)

    return Material(backbone=backbone, words=[], tokenize=none, parent=none, writes=writes, seed=seed)
