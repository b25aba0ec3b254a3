"""Encoders that nobody tried: one sentence, where prompts and heads would mean something else or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BeitConfig, IJepaConfig, PreTrainedConfig, ResNetConfig, SwinConfig, XmodConfig, XmodModel

from prefixkit.backbones.encoder_layers import measure_encoder
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import BackboneError

IMAGES = (
    # Biases by distance, which a prompt's rows have none of; no class token; windows; no attention.
    BeitConfig(),
    IJepaConfig(),
    SwinConfig(),
    ResNetConfig(),
)


@pytest.mark.parametrize("config", IMAGES, ids=lambda config: config.model_type)
def test_untried_encoders_of_images_are_refused_before_their_weights(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=rf"of the family vit or deit or .*; found {config.model_type}; use one"):
        load_backbone(tmp_path)


def test_what_an_encoder_says_of_its_input_is_one_sentence() -> None:
    model = XmodModel(XmodConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).eval()
    with pytest.raises(BackboneError, match="a text, or an image, and nothing else; found Input language unknown"):
        measure_encoder(model)
