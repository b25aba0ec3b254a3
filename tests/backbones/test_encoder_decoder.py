"""Encoder-decoders: each of the three prefixes against attention written out by hand, padded, cached and beamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, MarianConfig, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.geometry import refuse_untried
from prefixkit.backbones.load import load_backbone, load_decoder
from prefixkit.backbones.stacks import measure_stacks
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry, Positions
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefixes
from tests.architectures import VOCAB
from tests.architectures import tiny as tiny_decoder
from tests.encoder_decoders import CONFIGS, END, folder_of, oracle, random_prefixes, tiny, to_double, wrap
from tests.ragged import padded, prompts
from tests.ragged import random_prefix as random_decoder_prefix

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.1
WRITTEN = torch.tensor([[END, 11, 12, 13, 14, 15]])


@torch.no_grad()
def alone(model: PreTrainedModel, row: Tensor, prefixes: KeyValuePrefixes | None, written: Tensor = WRITTEN) -> Tensor:
    """Logits [1, target, vocab] of one source without padding, by hand."""
    logits: Tensor = oracle(model, prefixes)(input_ids=row[None], decoder_input_ids=written, use_cache=False).logits
    return logits


@pytest.mark.parametrize("places", [*((place,) for place in ATTENTIONS), ATTENTIONS], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_each_prefix_equals_attention_by_hand(family: str, dtype: torch.dtype, places: Any) -> None:
    model, row = tiny(family), prompts()[0]
    model = to_double(model) if dtype == torch.float64 else model
    backbone = wrap(model)
    prefixes = random_prefixes(backbone, places=places)
    with torch.no_grad():
        found = backbone.logits(row[None], None, WRITTEN, prefixes)
    assert (found - alone(model, row, prefixes)).abs().max() <= TOLERANCE[dtype]
    assert (found - alone(model, row, None)).abs().max() > EFFECT


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_each_row_of_a_ragged_batch_equals_itself_alone(family: str, side: str, implementation: str) -> None:
    model, rows = tiny(family, implementation=implementation), prompts()
    backbone = wrap(model)
    prefixes, targets = random_prefixes(backbone), WRITTEN.expand(3, -1)
    expected = [alone(model, row, prefixes) for row in rows]
    with torch.no_grad():
        found = backbone.logits(*padded(rows, side).values(), targets, prefixes)
    for index in range(len(rows)):
        assert (found[index] - expected[index][0]).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_target_logits_are_those_of_the_labels_and_no_padding_reaches_them(family: str) -> None:
    model, rows = tiny(family), prompts()
    backbone = wrap(model)
    prefixes, start = random_prefixes(backbone), model.config.decoder_start_token_id
    labels = torch.full((3, 7), -100)
    for index, length in enumerate((3, 7, 5)):
        labels[index, :length] = torch.arange(20, 20 + length)
    found = backbone.target_logits(*padded(rows).values(), labels, prefixes)
    expected = []
    for row, own in zip(rows, labels, strict=True):
        real = own[own != -100]
        expected.append(alone(model, row, prefixes, torch.cat([torch.tensor([start]), real[:-1]])[None])[0])
    assert found.shape == (15, VOCAB)
    assert (found - torch.cat(expected)).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", CONFIGS)
def test_zero_length_is_the_base_model_bit_for_bit(family: str) -> None:
    model = tiny(family)
    ids, mask = padded(prompts(), "right").values()
    asked = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": WRITTEN.expand(3, -1)}
    with torch.no_grad():
        expected = model(**asked).logits
        backbone = wrap(model)
        assert torch.equal(backbone.logits(*asked.values(), random_prefixes(backbone, 0)), expected)
        assert torch.equal(backbone.logits(*asked.values()), expected)
        assert torch.equal(backbone.release()(**asked).logits, expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_encoders_prefix_does_not_lengthen_its_output_and_the_others_do_not_reach_it(family: str) -> None:
    model, row = tiny(family), prompts()[0]
    backbone = wrap(model)
    with torch.no_grad():
        plain = model.get_encoder()(input_ids=row[None]).last_hidden_state
        for place in ATTENTIONS:
            with backbone.injected(random_prefixes(backbone, places=(place,))) as injected:
                found = injected.get_encoder()(input_ids=row[None]).last_hidden_state
            assert found.shape == plain.shape
            assert ((found - plain).abs().max() > EFFECT) == (place == ("encoder", "self"))


@pytest.mark.parametrize("family", ["bart", "t5", "flan"])
def test_cached_writing_equals_the_whole_forward_at_every_step(family: str) -> None:
    model, rows = tiny(family), prompts()
    backbone = wrap(model)
    prefixes = random_prefixes(backbone)
    written = backbone.generate([row.tolist() for row in rows], prefixes, stop=[], max_new_tokens=6)
    by_hand = oracle(model, prefixes)
    for row, found in zip(rows, written, strict=True):
        target = [model.config.decoder_start_token_id]
        for _ in range(6):
            with torch.no_grad():
                logits = by_hand(input_ids=row[None], decoder_input_ids=torch.tensor([target]), use_cache=False).logits
            target.append(int(logits[0, -1].argmax()))
        assert found == target[1:]
    assert written != backbone.generate([row.tolist() for row in rows], stop=[], max_new_tokens=6)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_cache_holds_the_text_alone_and_the_logits_of_every_step_are_the_same(family: str) -> None:
    model, row = tiny(family), prompts()[1][None]
    backbone, cache = wrap(model), None
    prefixes = random_prefixes(backbone)
    with torch.no_grad():
        whole = backbone.logits(row, None, WRITTEN, prefixes)[0]
        for step in range(WRITTEN.shape[1]):
            with backbone.injected(prefixes) as injected:
                made = injected(
                    input_ids=row, decoder_input_ids=WRITTEN[:, step : step + 1], past_key_values=cache, use_cache=True
                )
            cache = made.past_key_values
            assert (made.logits[0, 0] - whole[step]).abs().max() <= TOLERANCE[torch.float32]
    assert cache is not None
    assert cache.self_attention_cache.get_seq_length() == WRITTEN.shape[1]
    assert cache.cross_attention_cache.get_seq_length() == row.shape[1]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_beam_search_equals_itself_by_hand_and_no_row_depends_on_its_neighbours(family: str) -> None:
    model, rows = tiny(family), prompts()
    backbone = wrap(model)
    prefixes = random_prefixes(backbone)
    asked: dict[str, Any] = {"stop": [END], "max_new_tokens": 6, "num_beams": 3}
    together = backbone.generate([row.tolist() for row in rows], prefixes, **asked)
    assert together == [backbone.generate([row.tolist()], prefixes, **asked)[0] for row in rows]
    by_hand = oracle(model, prefixes)
    by_hand.generation_config = GenerationConfig()
    settings = GenerationConfig(
        num_beams=3,
        max_new_tokens=6,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=model.config.decoder_start_token_id,
        use_cache=False,
    )
    for row, found in zip(rows, together, strict=True):
        written = by_hand.generate(input_ids=row[None], generation_config=settings)[0, 1:].tolist()
        assert found == written[: written.index(END)] if END in written else found == written


def test_geometry_is_measured_for_each_stack() -> None:
    assert measure_stacks(tiny("flan"), "tiny")["encoder"] == (LayerGeometry(kv_heads=4, key_dim=16, value_dim=16),) * 2
    uneven = measure_stacks(tiny("t5_uneven"), "tiny")
    assert (len(uneven["encoder"]), len(uneven["decoder"])) == (3, 2)


def test_attention_that_is_not_reached_or_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5")
    model.get_decoder().block[1].layer[1].EncDecAttention.is_causal = True
    with pytest.raises(BackboneError, match=r"reach all 6 attention modules; found t5: decoder\.self in 3 layers"):
        measure_stacks(model, "tiny")
    wide = tiny("t5")
    for block in wide.get_decoder().block:
        cross = block.layer[1].EncDecAttention
        cross.key_value_proj_dim, cross.n_heads = 8, 8
    with pytest.raises(BackboneError, match="cross-attention of the shape of the decoder's self-attention"):
        measure_stacks(wide, "tiny")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["bart", "t5_uneven"])
def test_keys_and_values_of_a_text_are_what_each_attention_sees(family: str) -> None:
    """Two copies of the keys and values of a text halve each other's weight, and change nothing that is mixed."""
    model, text = tiny(family), prompts()[0]
    backbone = wrap(model)
    made = backbone.key_values_of(text.tolist())
    assert [part.place for part in made.parts] == ["decoder.self", "encoder.self", "decoder.cross"]
    assert {part.length for part in made.parts} == {len(text)}
    cross = KeyValuePrefixes(parts=tuple(part for part in made.parts if part.attention == "cross"))
    with torch.no_grad():
        plain = model(input_ids=text[None], decoder_input_ids=WRITTEN).logits
        found = backbone.logits(text[None], None, WRITTEN, cross)
    assert (found - plain).abs().max() <= 1e-4
    inside = next(part for part in made.parts if part.stack == "encoder")
    with torch.no_grad():
        states = model.get_encoder()(input_ids=text[None], output_hidden_states=True).hidden_states[1]
    layer = model.get_encoder().block[1].layer[0] if family != "bart" else model.get_encoder().layers[1]
    with torch.no_grad():
        key = layer.SelfAttention.k(layer.layer_norm(states)) if family != "bart" else layer.self_attn.k_proj(states)
    assert (inside.keys[1] - key.unflatten(-1, (4, -1)).transpose(1, 2)[0]).abs().max() <= 1e-5


def test_prefixes_that_take_positions_are_refused() -> None:
    backbone = wrap(tiny("t5"))
    (part,) = random_prefixes(backbone, places=(("decoder", "self"),)).parts
    shifted = KeyValuePrefixes(parts=(type(part)(**{**vars(part), "positions": Positions(text_start=6)}),))
    with pytest.raises(BackboneError, match=r"take no positions; found decoder\.self with text that starts at 6"):
        backbone.logits(prompts()[0][None], None, WRITTEN, shifted)
    with pytest.raises(BackboneError, match="prefixes or a prompt for an encoder-decoder; found a KeyValuePrefix"):
        backbone.logits(prompts()[0][None], None, WRITTEN, random_decoder_prefix(tiny_decoder("gpt2")))


def test_a_source_longer_than_the_context_is_refused() -> None:
    with pytest.raises(BackboneError, match="prompt: expected at most 128 tokens, the context; found 129"):
        wrap(tiny("bart")).generate([[5], [5] * 129], stop=[END], max_new_tokens=1)


def test_what_takes_decoders_only_says_so(tmp_path: Any) -> None:
    with pytest.raises(BackboneError, match="or a prompt, for a decoder; found prefixes for an encoder-decoder"):
        attach(tiny_decoder("gpt2"), random_prefixes(wrap(tiny("t5"))))
    CONFIGS["t5"]().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="found t5: an encoder-decoder; use a decoder"):
        load_decoder(tmp_path)
    MarianConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="encoder-decoder of bart or t5; found marian"):
        load_backbone(tmp_path)
    config = CONFIGS["t5"]()
    config.decoder_start_token_id = None
    with pytest.raises(BackboneError, match="expected decoder_start_token_id"):
        refuse_untried(config, "tiny")


def test_a_folder_loads_as_what_it_is(tmp_path: Any) -> None:
    backbone = load_backbone(folder_of("t5_uneven", tmp_path))
    assert (backbone.kind, backbone.paired, backbone.context_length) == ("encoder-decoder", True, None)
    assert {stack: len(layers) for stack, layers in backbone.identity.stacks.items()} == {"encoder": 3, "decoder": 2}
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
