"""Prompts in slots of a text: equal to the tokens that their vectors are, in both kinds of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.folding import fold
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import Combined, EmbeddingPrompt, HiddenPrompt
from prefixkit.injections.combined import NOWHERE
from prefixkit.task import SLOT_ID
from tests.encoders import encoder_folder

TOLERANCE = 1e-5
TOKENS = (40, 41, 42)
TEXT = [[5, 6, SLOT_ID, 7, SLOT_ID, 8, SLOT_ID, 9], [15, SLOT_ID, SLOT_ID, 16, 17, SLOT_ID, 0, 0]]
MASK = [[1] * 8, [1] * 6 + [0, 0]]


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "modernbert"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    made = load_backbone(encoder_folder(request.param, tmp_path_factory.mktemp(request.param)))
    assert isinstance(made, Encoder)
    return made


def prompt(backbone: Any, tokens: tuple[int, ...] = TOKENS, stack: str = "encoder") -> EmbeddingPrompt:
    return EmbeddingPrompt(
        embeddings=backbone.vocabulary[list(tokens)].clone(), positions=NOWHERE, stack=stack, placement="slots"
    )


def spelled(tokens: tuple[int, ...] = TOKENS) -> Tensor:
    """The texts with tokens in the place of their slots."""
    rows = []
    for row in TEXT:
        left = iter(tokens)
        rows.append([next(left) if token == SLOT_ID else token for token in row])
    return torch.tensor(rows)


def test_vectors_of_tokens_are_the_tokens(encoder: Encoder) -> None:
    mask, ids = torch.tensor(MASK), torch.tensor(TEXT)
    labels = torch.full(ids.shape, -100)
    labels[:, 3] = 30
    with torch.no_grad():
        found = encoder.target_logits(ids, mask, labels, prompt(encoder))
        wanted = encoder.target_logits(spelled(), mask, labels)
        other = encoder.target_logits(spelled((50, 51, 52)), mask, labels)
    assert (found - wanted).abs().max() <= TOLERANCE
    assert (found - other).abs().max() > 0.1


def test_the_order_of_slots_matters_and_each_has_a_gradient(encoder: Encoder) -> None:
    ids, mask = torch.tensor(TEXT), torch.tensor(MASK)
    vectors = encoder.vocabulary[list(TOKENS)].clone().requires_grad_()
    given = replace(prompt(encoder), embeddings=vectors)
    states = encoder.states({"input_ids": ids, "attention_mask": mask}, given)
    states[:, 0].square().sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad.abs().sum(dim=1) > 1e-6).all()
    with torch.no_grad():
        turned = encoder.states({"input_ids": ids, "attention_mask": mask}, prompt(encoder, TOKENS[::-1]))
    assert (states - turned).abs().max() > 0.1


def test_a_perturbation_is_added_in_every_layer(encoder: Encoder) -> None:
    """Against hooks of the test's own, on the model as transformers made it."""
    generator = torch.Generator().manual_seed(1)
    deltas = tuple(torch.randn(3, 64, generator=generator) for _ in range(2))
    hidden = HiddenPrompt(hidden=deltas, mode="add", placement="slots", positions=NOWHERE)
    inputs = {"input_ids": torch.tensor(TEXT[:1]), "attention_mask": torch.tensor(MASK[:1])}
    with torch.no_grad():
        found = encoder.states(inputs, Combined(parts=(prompt(encoder), hidden)))
        bare = encoder.states(inputs, prompt(encoder))
    model = encoder.release()
    places = [index for index, token in enumerate(TEXT[0]) if token == SLOT_ID]

    def add(delta: Tensor) -> Any:
        def before(_: Any, arguments: Any) -> Any:
            states = arguments[0].clone()
            states[:, places] += delta
            return (states, *arguments[1:])

        return before

    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 2)
    hooks = [layer.register_forward_pre_hook(add(delta)) for layer, delta in zip(layers, deltas, strict=True)]
    with torch.no_grad():
        types = encoder.token_types(spelled()[:1])
        wanted = model.base_model(input_ids=spelled()[:1], attention_mask=inputs["attention_mask"], **types)
    for hook in hooks:
        hook.remove()
    assert (found - wanted.last_hidden_state).abs().max() <= TOLERANCE
    assert (found - bare).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen3"])
def test_decoders_read_and_write_behind_slots(backbone_folder: Callable[..., Path], family: str) -> None:
    decoder = load_backbone(backbone_folder(family))
    given, ids, mask = prompt(decoder, stack="decoder"), torch.tensor(TEXT), torch.tensor(MASK)
    real = mask.bool()
    with torch.no_grad():
        found, wanted = decoder.logits(ids, mask, given), decoder.logits(spelled(), mask)
        other = decoder.logits(spelled((50, 51, 52)), mask)
    assert (found - wanted)[real].abs().max() <= TOLERANCE
    assert (found - other)[real].abs().max() > 0.1
    rows = [TEXT[0], TEXT[1][:6]]
    plain = [spelled()[0].tolist(), spelled()[1, :6].tolist()]
    written = decoder.generate(rows, given, stop=(), max_new_tokens=5)
    assert written == decoder.generate(plain, stop=(), max_new_tokens=5)
    assert written != decoder.generate([[50, *row] for row in plain], stop=(), max_new_tokens=5)


def test_what_does_not_fit_is_refused(encoder: Encoder, backbone_folder: Callable[..., Path]) -> None:
    inputs = {"input_ids": torch.tensor(TEXT), "attention_mask": torch.tensor(MASK)}
    with pytest.raises(MismatchError, match="expected 2 slots in every text; found 3 to 3"):
        encoder.states(inputs, prompt(encoder, (40, 41)))
    with pytest.raises(MismatchError, match="prompt vectors of width 64; found 8"):
        encoder.states(inputs, replace(prompt(encoder), embeddings=torch.zeros(3, 8)))
    decoder = load_backbone(backbone_folder("gpt2"))
    with pytest.raises(BackboneError, match="a prompt before the text; found one in slots of the text"):
        fold(decoder.model, prompt(decoder, stack="decoder"))
