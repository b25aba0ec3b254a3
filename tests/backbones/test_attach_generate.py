"""`generate` with a prefix attached, against an oracle that computes every step afresh without any hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.errors import BackboneError
from tests.architectures import tiny
from tests.ragged import greedy, padded, prompts, random_prefix

FAMILIES = ["gpt2", "llama", "mistral_window", "gemma3", "falcon", "bloom"]
REGISTRY = ["gpt2", "llama", "mistral_window", "gemma3"]
STEPS = 20
TOLERANCE = 1e-5


def attached(family: str) -> PreTrainedModel:
    model = tiny(family)
    return attach(model, random_prefix(model))


def write(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens [batch, steps] and their logits [batch, steps, vocab]."""
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    done = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return done.sequences[:, -STEPS:], torch.stack(done.logits, dim=1)


def by_hand(family: str) -> list[tuple[Tensor, Tensor]]:
    model = tiny(family)
    prefix = random_prefix(model)
    return [greedy(model, row, prefix, STEPS) for row in prompts()]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_full_forward_passes(family: str) -> None:
    model, expected = attached(family), by_hand(family)
    embedded = {**padded(prompts()), "inputs_embeds": model.get_input_embeddings()(padded(prompts())["input_ids"])}
    del embedded["input_ids"]
    for inputs, options in ((padded(prompts()), {}), (padded(prompts()), {"use_cache": False}), (embedded, {})):
        tokens, logits = write(model, inputs, **options)
        for row, (expected_tokens, expected_logits) in enumerate(expected):
            assert torch.equal(tokens[row], expected_tokens)
            assert (logits[row] - expected_logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [True, False])
def test_a_text_without_padding(family: str, masked: bool) -> None:
    for row, expected in zip(prompts(), by_hand(family), strict=True):
        # Without padding the model makes no mask while the text is shorter than a sliding window.
        mask = {"attention_mask": torch.ones_like(row[None])} if masked else {}
        tokens, logits = write(attached(family), {"input_ids": row[None], **mask}, bos_token_id=None)
        assert torch.equal(tokens[0], expected[0])
        assert (logits[0] - expected[1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", REGISTRY)
@pytest.mark.parametrize("masked", [True, False])
def test_a_static_cache_changes_nothing(family: str, masked: bool) -> None:
    row, expected = prompts()[1][None], by_hand(family)[1]
    mask = torch.ones_like(row) if masked else None
    tokens, logits = write(
        attached(family), {"input_ids": row, "attention_mask": mask}, cache_implementation="static", bos_token_id=None
    )
    assert torch.equal(tokens[0], expected[0])
    assert (logits[0] - expected[1]).abs().max() <= TOLERANCE
    tokens, _ = write(attached(family), padded(prompts()), cache_implementation="static")
    assert torch.equal(tokens[1], expected[0])


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_a_static_cache_has_no_room_for_a_prefix(family: str) -> None:
    with pytest.raises(BackboneError, match="found a static cache"):
        write(attached(family), padded(prompts()), cache_implementation="static")
    with pytest.raises(BackboneError, match="found an attention mask of 4 dimensions"):
        attached(family)(input_ids=prompts()[0][None], attention_mask=torch.ones(1, 1, 5, 5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_gives_each_row_what_it_gets_alone(family: str, use_cache: bool) -> None:
    model = attached(family)
    tokens = model.generate(**padded(prompts()), **BEAMS, use_cache=use_cache)[:, -STEPS:]
    for row, prompt in enumerate(prompts()):
        apart = model.generate(**padded([prompt]), **BEAMS)
        assert torch.equal(tokens[row], apart[0, -STEPS:])


BEAMS = {
    "num_beams": 3,
    "do_sample": False,
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_draws_what_a_prefix_in_the_cache_would(family: str) -> None:
    model, row = tiny(family), prompts()[1]
    prefix = random_prefix(model)
    torch.manual_seed(3)
    expected = sample_by_hand(model, row.repeat(4, 1), prefix)
    torch.manual_seed(3)
    inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
    tokens, _ = write(attach(model, prefix), inputs, do_sample=True, num_return_sequences=4, top_k=0)
    assert torch.equal(tokens, expected)
    assert len({tuple(row) for row in tokens.tolist()}) == 4


@torch.no_grad()
def sample_by_hand(model: PreTrainedModel, rows: Tensor, prefix: Any) -> Tensor:
    batch, cache = rows.shape[0], DynamicCache()
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    fresh, position, written = rows, prefix.length, []
    for _ in range(STEPS):
        positions = torch.arange(position, position + fresh.shape[1]).expand(batch, -1)
        given = {} if model.config.model_type == "bloom" else {"position_ids": positions}
        mask = torch.ones(batch, position + fresh.shape[1], dtype=torch.long)
        logits = model(input_ids=fresh, attention_mask=mask, past_key_values=cache, **given).logits[:, -1]
        position += fresh.shape[1]
        fresh = torch.multinomial(torch.softmax(logits, dim=-1), 1)
        written.append(fresh)
    return torch.cat(written, dim=1)


def test_a_conversation_goes_on_with_its_cache() -> None:
    for family in ("llama", "falcon"):
        model, row = attached(family), prompts()[1]
        with torch.no_grad():
            whole = model(input_ids=row[None]).logits[0]
            first = model(input_ids=row[None, :12], use_cache=True)
            rest = model(input_ids=row[None, 12:], past_key_values=first.past_key_values, use_cache=True)
        assert (torch.cat([first.logits[0], rest.logits[0]]) - whole).abs().max() <= TOLERANCE


def test_prompt_lookup_writes_the_same() -> None:
    row = prompts()[1]
    inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = attached("llama").generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(written[0, -STEPS:], by_hand("llama")[1][0])
