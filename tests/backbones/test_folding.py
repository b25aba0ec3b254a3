"""Folding: a soft prompt as keys and values equals the same vectors in front of the text, on every architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.folding import fold
from prefixkit.backbones.identity import memory_digest
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt
from prefixkit.methods.p_tuning import PromptEncoder
from prefixkit.methods.prompt_tuning import PromptTuning
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix

TOLERANCE = 1e-5
EFFECT = 0.1
LENGTH = 4
WORDS = [7, 30, 111, 2]

# transformers renamed it in 5.23; the old name works with every version that we accept.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")


def random_prompt(model: PreTrainedModel, length: int = LENGTH) -> EmbeddingPrompt:
    """Vectors of the size of the model's own, which mean nothing."""
    table = model.get_input_embeddings()(torch.arange(64)).detach()
    noise = torch.randn(length, table.shape[1], generator=torch.Generator().manual_seed(4))
    return EmbeddingPrompt(embeddings=noise * table.std(), positions=Positions(text_start=length))


def concatenated(model: PreTrainedModel, prompt: EmbeddingPrompt, row: Tensor) -> Tensor:
    """The oracle: logits [seq, vocab] behind the prompt's vectors in a model without hooks."""
    vectors = torch.cat([prompt.embeddings, model.get_input_embeddings()(row)])[None]
    logits: Tensor = model(inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2])).logits
    return logits[0, prompt.length :]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_equals_the_prompt_before_it_alone(family: str, side: str) -> None:
    model, rows = tiny(family), prompts()
    prompt = random_prompt(model)
    ids, mask = padded(rows, side).values()
    with torch.no_grad():
        expected = [concatenated(model, prompt, row) for row in rows]
        bare = [model(input_ids=row[None]).logits[0] for row in rows]
        logits = wrap(model).logits(ids, mask, prompt)
    for index in range(len(rows)):
        found = logits[index][mask[index].bool()]
        assert (found - expected[index]).abs().max() <= TOLERANCE
        assert (found - bare[index]).abs().max() > EFFECT


@pytest.mark.parametrize("family", CONFIGS)
def test_the_vectors_of_words_are_the_words(family: str) -> None:
    decoder, row = wrap(tiny(family)), prompts()[1]
    prompt = EmbeddingPrompt(embeddings=decoder.vocabulary[WORDS], positions=Positions(text_start=len(WORDS)))
    with torch.no_grad():
        found = decoder.logits(row[None], None, prompt)[0]
        hard = decoder.release()(input_ids=torch.cat([torch.tensor(WORDS), row])[None]).logits[0, len(WORDS) :]
        bare = decoder.model(input_ids=row[None]).logits[0]
    assert (found - hard).abs().max() <= TOLERANCE
    assert (found - bare).abs().max() > EFFECT


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_concatenation_and_reach_every_vector(family: str) -> None:
    model, row = tiny(family).requires_grad_(False), prompts()[1]
    prompt = random_prompt(model)
    ours, theirs = (prompt.embeddings.clone().requires_grad_() for _ in range(2))
    torch.log_softmax(concatenated(model, replace(prompt, embeddings=theirs), row)[-1], 0)[9].backward()
    torch.log_softmax(wrap(model).logits(row[None], None, replace(prompt, embeddings=ours))[0, -1], 0)[9].backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert (ours.grad - theirs.grad).abs().max() <= TOLERANCE * max(1.0, theirs.grad.abs().max().item())
    assert (ours.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_gradients_through_the_encoder_equal_finite_differences(encoder: str) -> None:
    decoder = wrap(tiny("gpt2").double())
    torch.manual_seed(0)
    network = PromptEncoder(torch.zeros(3, 64), encoder=encoder, exact_start=False)
    method = PromptTuning(torch.zeros(3, 64), network=network).double()
    row = prompts()[0][None]

    def loss() -> Tensor:
        return torch.log_softmax(decoder.logits(row, None, method())[0, -1], 0)[20]

    loss().backward()
    for parameter in (network.embedding.weight, network.head[0].weight):
        assert isinstance(parameter, Tensor)
        assert parameter.grad is not None
        with torch.no_grad():
            parameter[1, 2] += 1e-5
            above = loss()
            parameter[1, 2] -= 2e-5
            below = loss()
            parameter[1, 2] += 1e-5
        assert parameter.grad[1, 2].item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-5, abs=1e-9)
        assert parameter.grad[1, 2] != 0


def test_folding_twice_and_keys_and_values_change_nothing() -> None:
    model = tiny("llama")
    once = fold(model, random_prompt(model))
    assert fold(model, once) is once
    assert (once.length, once.positions) == (LENGTH, Positions(text_start=LENGTH))


def losses(model: PreTrainedModel, method: PromptTuning, **checkpointing: Any) -> tuple[float, Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable(**checkpointing)
    model.train()
    loss = attach(model, method)(**labelled(padded(prompts()))).loss
    loss.backward()
    (parameter,) = method.parameters()
    assert parameter.grad is not None
    return loss.item(), parameter.grad


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_attached_prompts_train_under_gradient_checkpointing(family: str) -> None:
    plain, gradient = losses(tiny(family), PromptTuning(random_prompt(tiny(family)).embeddings))
    again, checkpointed = losses(
        tiny(family),
        PromptTuning(random_prompt(tiny(family)).embeddings),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert again == pytest.approx(plain, abs=1e-6)
    assert gradient.abs().max() > 1e-3
    assert (checkpointed - gradient).abs().max() <= 1e-6


def test_a_fixed_prompt_generates_and_leaves_no_trace() -> None:
    model, row = tiny("llama"), prompts()[0][None]
    before, prompt = memory_digest(model), random_prompt(model)
    bare = model.generate(row, max_new_tokens=6, do_sample=False)
    text = row
    for _ in range(6):
        text = torch.cat([text, concatenated(model, prompt, text[0])[-1].argmax()[None, None]], dim=1)
    attach(model, prompt)
    assert torch.equal(model.generate(row, max_new_tokens=6, do_sample=False), text)
    assert torch.equal(detach(model).generate(row, max_new_tokens=6, do_sample=False), bare)
    assert not torch.equal(text, bare)
    assert memory_digest(model) == before


def test_prompts_that_cannot_be_folded_are_refused() -> None:
    model = tiny("gpt2")
    prompt = random_prompt(model)
    with pytest.raises(MismatchError, match="expected prompt vectors of width 64; found 8"):
        fold(model, replace(prompt, embeddings=torch.zeros(LENGTH, 8)))
    with pytest.raises(BackboneError, match="expected text that starts at 4, behind the prompt"):
        fold(model, replace(prompt, positions=Positions(text_start=0, prefix_takes_positions=False)))
    assert fold(model, random_prefix(model)).length == 6
