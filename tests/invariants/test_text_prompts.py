"""Soft prompts on encoders of text: the vectors of words are the words, in front of a text and in slots of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.encoder import Encoder
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import Positions
from prefixkit.injections import Combined, EmbeddingPrompt, HiddenPrompt
from prefixkit.injections.combined import NOWHERE
from prefixkit.task import SLOT_ID
from tests.encoders import TEXT, rows, spelled_out, together
from tests.invariants.insertion import raised

Load = Callable[..., Encoder]
Plain = Callable[..., PreTrainedModel]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.1
WORDS = [7, 30, 111]
PLACES = [1, 4, 6]
"""Where the slots are in the first of the rows."""


def before(backbone: Encoder, words: list[int] = WORDS) -> EmbeddingPrompt:
    vectors = backbone.vocabulary[words]
    return EmbeddingPrompt(embeddings=vectors, positions=Positions(text_start=len(words)), stack="encoder")


def within(backbone: Encoder) -> EmbeddingPrompt:
    vectors = backbone.vocabulary[WORDS]
    return EmbeddingPrompt(embeddings=vectors, positions=NOWHERE, stack="encoder", placement="slots")


def opened(ids: Tensor, fillers: list[int]) -> Tensor:
    filled = ids.clone()
    filled[0, PLACES] = torch.tensor(fillers)
    return filled


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", TEXT)
def test_the_vectors_of_words_are_the_words_in_front(
    encoder: Load, plain: Plain, family: str, dtype: torch.dtype
) -> None:
    """At the first positions, of the first type; the text follows."""
    backbone, (row, *_), words = encoder(family, dtype), rows(family), torch.tensor([WORDS])
    longer = {name: torch.cat([words if name == "input_ids" else words * 0 + 1, row[name]], dim=1) for name in row}
    asked = spelled_out(family, longer)
    if "token_type_ids" in asked:
        asked["token_type_ids"] = torch.cat([words * 0, spelled_out(family, row)["token_type_ids"]], dim=1)
    expected = plain(family, dtype).base_model(**asked).last_hidden_state[:, len(WORDS) :]
    found = backbone.states(row, before(backbone))
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.states(row)).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", TEXT)
def test_the_vectors_of_words_are_the_words_in_slots(
    encoder: Load, plain: Plain, family: str, dtype: torch.dtype
) -> None:
    backbone, (row, *_) = encoder(family, dtype), rows(family)
    ids, labels = row["input_ids"], torch.full_like(row["input_ids"], -100)
    labels[0, 5] = 9
    words = spelled_out(family, {**row, "input_ids": opened(ids, WORDS)})
    slotted, prompt = {**row, "input_ids": opened(ids, [SLOT_ID] * 3)}, within(backbone)
    model = plain(family, dtype)
    expected = model.base_model(**words).last_hidden_state
    assert (backbone.states(slotted, prompt) - expected).abs().max() <= TOLERANCE[dtype]
    told = backbone.target_logits(**slotted, labels=labels, prefix=prompt)
    assert (told - model(**words).logits[0, 5]).abs().max() <= TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("family", TEXT)
def test_perturbations_in_slots_are_added_in_every_layer(encoder: Load, plain: Plain, family: str) -> None:
    """As Qin & Eisner 2021 have them: vectors in the slots, and something on top of them at the input of each layer."""
    backbone, (row, *_) = encoder(family), rows(family)
    rise = tuple(torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5)))
    hidden = HiddenPrompt(hidden=rise, mode="add", placement="slots", positions=NOWHERE)
    received = Combined(parts=(within(backbone), hidden))
    words = spelled_out(family, {**row, "input_ids": opened(row["input_ids"], WORDS)})
    slotted = {**row, "input_ids": opened(row["input_ids"], [SLOT_ID] * 3)}
    with raised(plain(family).base_model, rise, PLACES) as base:
        expected = base(**words).last_hidden_state
    found = backbone.states(slotted, received)
    assert (found - expected).abs().max() <= TOLERANCE[torch.float32]
    assert (found - backbone.states(slotted, within(backbone))).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("family", TEXT)
def test_each_row_of_a_batch_is_itself_alone(encoder: Load, family: str) -> None:
    backbone, inputs = encoder(family), rows(family)
    prompt = before(backbone)
    found = backbone.states(together(inputs, more=4), prompt)
    for index, row in enumerate(inputs):
        alone = backbone.states(row, prompt)[0]
        assert (found[index, : len(alone)] - alone).abs().max() <= TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("family", TEXT)
def test_the_order_of_a_prompt_matters(encoder: Load, family: str) -> None:
    """Unlike that of a prefix's slots: its vectors stand at positions."""
    backbone, (row, *_) = encoder(family), rows(family)
    turned = backbone.states(row, before(backbone, WORDS[::-1]))
    assert (turned - backbone.states(row, before(backbone))).abs().max() > 1e-3


def test_text_that_would_start_elsewhere_is_refused(encoder: Load) -> None:
    backbone, (row, *_) = encoder("bert"), rows("bert")
    with pytest.raises(BackboneError, match="text that starts at 3, behind the prompt; found text that starts at 0"):
        backbone.states(row, replace(before(backbone), positions=NOWHERE))
