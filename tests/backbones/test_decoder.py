"""Every architecture against itself: a row of a ragged batch must give what it gives alone in the unmodified model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM, DynamicCache, PreTrainedModel

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import measure
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import BackboneIdentity, Positions
from prefixkit.injections import KeyValuePrefix
from tests.architectures import CONFIGS, VOCAB, WINDOW, tiny
from tests.ragged import alone, greedy, padded, prompts, random_prefix

TOLERANCE = 1e-5
EFFECT = 0.1


def wrap(model: PreTrainedModel) -> Decoder:
    geometry = measure(model, "tiny")
    identity = BackboneIdentity(
        name="tiny",
        family=model.config.model_type,
        hidden_size=64,
        vocab_size=VOCAB,
        context_length=128,
        dtype="float32",
        config_hash=None,
        weights_hash=None,
        tokenizer_hash=None,
        stacks={"decoder": geometry},
    )
    return Decoder(model, Path(), identity, geometry)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_ragged_batch_equals_itself_alone(family: str, side: str) -> None:
    decoder, rows = wrap(tiny(family)), prompts()
    prefix = random_prefix(decoder.model)
    expected = [alone(decoder.model, row, prefix) for row in rows]
    bare = [alone(decoder.model, row, None) for row in rows]
    ids, mask = padded(rows, side).values()
    with torch.no_grad():
        logits = decoder.logits(ids, mask, prefix)
    for index in range(len(rows)):
        found = logits[index][mask[index].bool()]
        assert (found - expected[index]).abs().max() <= TOLERANCE
        assert (found - bare[index]).abs().max() > EFFECT


@pytest.mark.parametrize("family", CONFIGS)
def test_zero_length_prefix_is_the_base_model_bit_for_bit(family: str) -> None:
    model = tiny(family)
    row = prompts()[1][None]
    with torch.no_grad():
        expected = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        decoder = wrap(model)
        assert torch.equal(decoder.logits(row, torch.ones_like(row), random_prefix(decoder.model, 0)), expected)
        assert torch.equal(decoder.release()(input_ids=row, attention_mask=torch.ones_like(row)).logits, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_keys_and_values_of_a_text_equal_the_text_in_the_context(family: str) -> None:
    decoder = wrap(tiny(family))
    context, row = prompts()[2], prompts()[0]
    whole = torch.cat([context, row])[None]
    with torch.no_grad():
        expected = decoder.logits(whole)[0, len(context) :]
        without = decoder.logits(row[None])[0]
        found = decoder.logits(row[None], None, decoder.key_values_of(context.tolist()))[0]
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - without).abs().max() > EFFECT


def test_reading_a_text_computes_the_logits_of_one_position() -> None:
    decoder, seen = wrap(tiny("llama")), []
    decoder.model.get_output_embeddings().register_forward_hook(lambda _, given, made: seen.append(made.shape))
    decoder.key_values_of(prompts()[1].tolist())
    assert seen == [(1, 1, VOCAB)]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_logits_at_chosen_positions_are_the_same_logits(family: str) -> None:
    decoder = wrap(tiny(family))
    ids, mask = padded(prompts(), "right").values()
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    chosen[0, 2], chosen[1, 7:11] = True, True
    with torch.no_grad():
        every = decoder.logits(ids, mask, random_prefix(decoder.model))
        some = decoder.logits_where(chosen, ids, mask, random_prefix(decoder.model))
    assert some.shape == (5, VOCAB)
    assert (some - every[chosen]).abs().max() <= TOLERANCE


def test_attention_that_is_biased_by_values_is_refused_and_left_as_it_was() -> None:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DogeForCausalLM(DogeConfig(vocab_size=VOCAB, **size)).eval()
    expected = model(prompts()[0][None]).logits
    with pytest.raises(BackboneError, match=r"doge: expected attention that looks at keys and values alone"):
        wrap(model).logits(prompts()[0][None], None, random_prefix(model))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(prompts()[0][None]).logits, expected)


def test_permuting_prefix_slots_changes_nothing() -> None:
    decoder = wrap(tiny("llama"))
    prefix, order = random_prefix(decoder.model), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = KeyValuePrefix(
        keys=tuple(key[:, order] for key in prefix.keys),
        values=tuple(value[:, order] for value in prefix.values),
        positions=prefix.positions,
    )
    row = prompts()[0][None]
    with torch.no_grad():
        assert (decoder.logits(row, None, prefix) - decoder.logits(row, None, moved)).abs().max() <= TOLERANCE


def test_text_may_start_at_position_zero() -> None:
    decoder = wrap(tiny("gpt2"))
    prefix, row = random_prefix(decoder.model), prompts()[0]
    kept = KeyValuePrefix(
        keys=prefix.keys,
        values=prefix.values,
        positions=Positions(text_start=0, prefix_takes_positions=False),
    )
    cache = DynamicCache()
    for layer in range(2):
        cache.update(prefix.keys[layer][None], prefix.values[layer][None], layer)
    with torch.no_grad():
        expected = decoder.release()(
            input_ids=row[None], past_key_values=cache, position_ids=torch.arange(len(row))[None]
        ).logits
        found = decoder.logits(row[None], None, kept)
        assert (found - expected).abs().max() <= TOLERANCE
        assert (found - decoder.logits(row[None], None, prefix)).abs().max() > EFFECT


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_writing_ends_with_the_context_whatever_the_neighbours_do(family: str, num_beams: int) -> None:
    decoder = wrap(tiny(family))
    prefix = random_prefix(decoder.model)
    rows = [[1 + (3 * length + step) % 300 for step in range(length)] for length in (5, 121, 40, 119, 7)]
    asked = {"stop": [VOCAB - 1], "max_new_tokens": 12, "num_beams": num_beams}
    together = decoder.generate(rows, prefix, **asked)
    assert together == [decoder.generate([row], prefix, **asked)[0] for row in rows]
    assert [len(written) for written in together] == [12, 1, 12, 3, 12]


def test_without_a_stop_token_writing_goes_on_to_its_limit() -> None:
    decoder = wrap(tiny("gpt2"))
    assert [len(row) for row in decoder.generate([[5], [6, 7]], stop=[], max_new_tokens=9)] == [9, 9]


def test_a_checkpoints_own_generation_settings_change_nothing() -> None:
    """Instruction-tuned checkpoints carry penalties and sampling, which transformers fills in unasked."""
    decoder = wrap(tiny("llama"))
    row, prefix = prompts()[0], random_prefix(decoder.model)
    expected = greedy(decoder.model, row, prefix, 8)[0].tolist()
    habits = decoder.model.generation_config
    habits.update(repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=expected, forced_eos_token_id=7)
    assert decoder.generate([row.tolist()], prefix, stop=[], max_new_tokens=8) == [expected]
    assert decoder.model.generation_config is habits


def test_prompt_that_fills_the_context_is_refused() -> None:
    decoder = wrap(tiny("gpt2"))
    with pytest.raises(BackboneError, match=r"prompt: expected at most 121 tokens.* context of 128; found 122"):
        decoder.generate([[5], [5] * 122], random_prefix(decoder.model), stop=[0], max_new_tokens=1)


def test_window_that_would_swallow_the_prefix_is_said() -> None:
    decoder = wrap(tiny("mistral_window"))
    with pytest.raises(BackboneError, match=f"sliding window of {WINDOW} tokens.*window would swallow"):
        decoder.key_values_of(list(range(1, WINDOW + 1)))
