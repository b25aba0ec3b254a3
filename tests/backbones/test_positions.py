"""Which models can be told where the text starts, Falcon with ALiBi among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, MptConfig, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.identity import context_length
from prefixkit.backbones.positions import has_alibi, refuse_unplaceable, takes_positions
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import Positions
from tests.architectures import CONFIGS, VOCAB, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import alone, padded, prompts, random_prefix

WITHIN = Positions(text_start=0, prefix_takes_positions=False)


def falcon_alibi() -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS["falcon"]()
    config.alibi = True
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_all_but_bloom_take_positions(family: str) -> None:
    model = tiny(family)
    assert takes_positions(model) == (family != "bloom")
    assert has_alibi(model.config) == (family == "bloom")


def test_falcon_with_alibi_counts_tokens_itself() -> None:
    model = falcon_alibi()
    assert has_alibi(model.config)
    assert not takes_positions(model)
    assert context_length(model.config) is None


def test_rows_of_falcon_with_alibi_get_what_they_get_alone() -> None:
    decoder, rows = wrap(falcon_alibi()), prompts()
    prefix = random_prefix(decoder.model)
    expected = [alone(decoder.model, row, prefix) for row in rows]
    ids, mask = padded(rows, "left").values()
    with torch.no_grad():
        logits = decoder.logits(ids, mask, prefix)
    for index, row in enumerate(expected):
        assert (logits[index][mask[index].bool()] - row).abs().max() <= 1e-5


@pytest.mark.parametrize("make", [falcon_alibi, lambda: tiny("bloom")])
def test_text_that_cannot_be_placed_is_refused(make: object) -> None:
    assert callable(make)
    model = make()
    length = random_prefix(model).length
    refuse_unplaceable(model, Positions(text_start=length), length)
    message = rf"starts at {length}, .*; found text that starts at 0; .*--set method\.positions=offset"
    with pytest.raises(BackboneError, match=message):
        refuse_unplaceable(model, WITHIN, length)
    with pytest.raises(BackboneError, match=message):
        attach(model, replace(random_prefix(model), positions=WITHIN))


def mpt() -> PreTrainedModel:
    """It biases attention by slot: left padding would push its prefix away from the text."""
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=VOCAB, max_seq_len=128)
    return AutoModelForCausalLM.from_config(config).eval()


def bart() -> PreTrainedModel:
    """A decoder alone, which passes over position ids: its text would start at 0, whatever the prefix says."""
    shape = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
    }
    config = BartConfig(vocab_size=VOCAB, is_encoder_decoder=False, is_decoder=True, **shape)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [mpt, bart])
def test_a_model_that_counts_cache_slots_is_refused(make: object) -> None:
    assert callable(make)
    model = make()
    with pytest.raises(BackboneError, match=r"expected .* found one that counts the slots of its cache"):
        attach(model, random_prefix(model))
    with pytest.raises(BackboneError, match="counts the slots of its cache"):
        wrap(model).logits(prompts()[0][None], None, random_prefix(model))


def test_models_with_position_ids_place_text_anywhere() -> None:
    refuse_unplaceable(tiny("gpt2"), WITHIN, 4)
