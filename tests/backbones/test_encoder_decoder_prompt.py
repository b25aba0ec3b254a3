"""A prompt at the encoder's input: against real tokens, against attention by hand, padded, written with, refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt
from tests.encoder_decoders import CONFIGS, END, oracle, tiny, to_double, wrap
from tests.ragged import padded, prompts

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.1
WRITTEN = torch.tensor([[END, 11, 12, 13, 14, 15]])
TOKENS = [21, 22, 23, 24, 25, 26]


def of_tokens(model: PreTrainedModel) -> EmbeddingPrompt:
    """The vectors of `TOKENS`."""
    vectors = model.get_encoder().get_input_embeddings()(torch.tensor(TOKENS))
    return EmbeddingPrompt(embeddings=vectors.detach(), positions=Positions(text_start=len(TOKENS)), stack="encoder")


def random_prompt(model: PreTrainedModel, length: int = 6) -> EmbeddingPrompt:
    """Vectors of the size of the tokens' that mean nothing."""
    spread = of_tokens(model).embeddings.std()
    noise = torch.randn(length, model.config.d_model, generator=torch.Generator().manual_seed(1)).to(spread)
    return EmbeddingPrompt(embeddings=spread * noise, positions=Positions(text_start=length), stack="encoder")


@torch.no_grad()
def alone(model: PreTrainedModel, row: Tensor, prompt: EmbeddingPrompt | None, written: Tensor = WRITTEN) -> Tensor:
    """Logits [1, target, vocab] of one source without padding, by hand, the prompt in front of its vectors."""
    vectors = model.get_encoder().get_input_embeddings()(row[None])
    if prompt is not None:
        vectors = torch.cat([prompt.embeddings[None], vectors], dim=1)
    logits: Tensor = oracle(model, None)(inputs_embeds=vectors, decoder_input_ids=written, use_cache=False).logits
    return logits


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_vectors_of_tokens_equal_the_tokens_in_the_source(family: str, dtype: torch.dtype) -> None:
    model, row = tiny(family), prompts()[0]
    model = to_double(model) if dtype == torch.float64 else model
    backbone, hard = wrap(model), torch.cat([torch.tensor(TOKENS), row])
    found = backbone.logits(row[None], None, WRITTEN, of_tokens(model))
    assert (found - backbone.logits(hard[None], None, WRITTEN)).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.logits(row[None], None, WRITTEN)).abs().max() > EFFECT


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_any_vectors_stand_before_those_of_the_source(family: str, dtype: torch.dtype) -> None:
    model, row = tiny(family), prompts()[0]
    model = to_double(model) if dtype == torch.float64 else model
    prompt = random_prompt(model)
    found = wrap(model).logits(row[None], None, WRITTEN, prompt)
    assert (found - alone(model, row, prompt)).abs().max() <= TOLERANCE[dtype]
    assert (found - alone(model, row, None)).abs().max() > EFFECT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_each_row_of_a_ragged_batch_equals_itself_alone(family: str, side: str) -> None:
    model, rows = tiny(family), prompts()
    prompt = random_prompt(model)
    with torch.no_grad():
        found = wrap(model).logits(*padded(rows, side).values(), WRITTEN.expand(3, -1), prompt)
    for index, row in enumerate(rows):
        assert (found[index] - alone(model, row, prompt)[0]).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_slot_has_a_gradient_and_a_finite_difference_agrees(family: str) -> None:
    backbone = wrap(to_double(tiny(family)).requires_grad_(False))
    prompt = random_prompt(backbone.model)
    vectors = prompt.embeddings.clone().requires_grad_()
    batch, labels = padded(prompts()).values(), WRITTEN.expand(3, -1)

    def loss(embeddings: Tensor) -> Tensor:
        logits = backbone.target_logits(*batch, labels, replace(prompt, embeddings=embeddings))
        return torch.nn.functional.cross_entropy(logits, labels.flatten())

    loss(vectors).backward()
    gradient = vectors.grad
    assert gradient is not None
    assert (gradient.abs().amax(dim=1) > 1e-6).all()
    way = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        difference = (loss(vectors + 1e-7 * way) - loss(vectors - 1e-7 * way)) / 2e-7
    assert (gradient * way).sum().item() == pytest.approx(difference.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_no_vectors_are_the_base_model(family: str) -> None:
    model, row = tiny(family), prompts()[1][None]
    with torch.no_grad():
        found = wrap(model).logits(row, None, WRITTEN, random_prompt(model, 0))
        assert (found - model(input_ids=row, decoder_input_ids=WRITTEN).logits).abs().max() <= 1e-6


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_writing_equals_the_tokens_in_the_source_and_no_row_depends_on_its_neighbours(family: str, beams: int) -> None:
    model, rows = tiny(family), [row.tolist() for row in prompts()]
    backbone, prompt = wrap(model), of_tokens(model)
    asked: dict[str, Any] = {"stop": [END], "max_new_tokens": 8, "num_beams": beams}
    found = backbone.generate(rows, prompt, **asked)
    assert found == backbone.generate([[*TOKENS, *row] for row in rows], **asked)
    assert found == [backbone.generate([row], prompt, **asked)[0] for row in rows]
    assert found != backbone.generate(rows, **asked)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", ["bart_uneven", "t5"])
def test_peft_agrees_when_it_is_told_to_leave_the_decoder_alone(family: str) -> None:
    """By default PEFT makes two prompts; and untied, it reads BART's source from a table that BART does not use."""
    model, prompt = tiny(family), random_prompt(tiny(family))
    batch = {**padded(prompts(), "right"), "decoder_input_ids": WRITTEN.expand(3, -1)}
    with torch.no_grad():
        expected = wrap(tiny(family)).logits(*batch.values(), prompt)
        asked = PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=prompt.length, num_transformer_submodules=1
        )
        theirs = get_peft_model(model, asked).eval()
        theirs.prompt_encoder["default"].embedding.weight.copy_(prompt.embeddings)
        assert (theirs(**batch).logits - expected).abs().max() <= TOLERANCE[torch.float32]


def test_prompts_elsewhere_are_refused() -> None:
    model, row = tiny("t5"), prompts()[0][None]
    prompt = random_prompt(model)
    for other, told in (
        (replace(prompt, stack="decoder"), "found one of the decoder, placed prepend, with text that starts at 6"),
        (replace(prompt, placement="after_first"), "one of the encoder, placed after_first"),
        (replace(prompt, positions=Positions(text_start=0, prefix_takes_positions=False)), "that starts at 0"),
    ):
        with pytest.raises(BackboneError, match=f"a prompt at the encoder's input, .*{told}"):
            wrap(model).logits(row, None, WRITTEN, other)
    narrow = replace(prompt, embeddings=prompt.embeddings[:, :32])
    with pytest.raises(MismatchError, match="expected prompt vectors of width 64; found 32; use the backbone"):
        wrap(model).logits(row, None, WRITTEN, narrow)


def test_a_prompt_takes_room_where_the_context_has_an_end() -> None:
    bart, t5 = wrap(tiny("bart")), wrap(tiny("t5"))
    prompt = random_prompt(bart.model)
    assert (bart.room_behind(prompt), bart.room_behind(None), t5.room_behind(prompt)) == (122, 128, None)
    assert len(bart.generate([[5] * 122], prompt, stop=[], max_new_tokens=1)[0]) == 1
    with pytest.raises(BackboneError, match="at most 122 tokens, what the prompt leaves of the context; found 123"):
        bart.generate([[5] * 123], prompt, stop=[], max_new_tokens=1)
    with pytest.raises(BackboneError, match="a prompt shorter than the context of 128 tokens; found 127 vectors"):
        bart.refuse_unplaceable(random_prompt(bart.model, 127))
