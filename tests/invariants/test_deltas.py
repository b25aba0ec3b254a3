"""Parameter deltas: the model whose parameters were changed in place, for the length of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.deltas import biases, changed, named_parameters, normalizations
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.identity import memory_digest
from prefixkit.errors import MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import Combined, EmbeddingPrompt, ParameterDelta
from tests import encoder_decoders
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap
from tests.encoders import CONFIGS, rows, spelled_out
from tests.ragged import prompts

Load = Callable[..., Encoder]
Plain = Callable[..., PreTrainedModel]
Chosen = Callable[[PreTrainedModel], Mapping[str, Tensor]]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.05
DECODERS = ("gpt2", "opt", "gpt_neox", "bloom", "qwen2")
"""Decoders with biases."""
CHANGED = [
    (family, chosen)
    for family in CONFIGS
    for chosen in (biases, normalizations)
    # ModernBERT has no bias but the one of its head, over words.
    if (family, chosen) != ("modernbert", biases)
]


def drawn(parameters: Mapping[str, Tensor]) -> ParameterDelta:
    generator = torch.Generator().manual_seed(8)
    deltas = {name: 0.3 * torch.randn(weight.shape, generator=generator) for name, weight in parameters.items()}
    return ParameterDelta(deltas=deltas)


def moved(model: PreTrainedModel, delta: ParameterDelta) -> PreTrainedModel:
    """The oracle: a copy whose parameters were changed for good."""
    copied = deepcopy(model)
    parameters = dict(copied.named_parameters())
    with torch.no_grad():
        for name, change in delta.deltas.items():
            own = parameters.get(name)
            weight = own if own is not None else parameters[f"{model.base_model_prefix}.{name}"]
            weight.add_(change.to(weight.dtype))
    return copied


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("family", "chosen"), CHANGED)
def test_encoders_are_those_with_changed_parameters(
    encoder: Load, family: str, dtype: torch.dtype, chosen: Chosen
) -> None:
    backbone, (row, *_) = encoder(family, dtype), rows(family, dtype)
    delta, before = drawn(chosen(backbone.model)), memory_digest(backbone.model)
    expected = moved(backbone.release(), delta).base_model(**spelled_out(family, row)).last_hidden_state
    found = backbone.states(row, delta)
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.states(row)).abs().max() > EFFECT
    assert memory_digest(backbone.model) == before


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_decoders_are_those_with_changed_parameters(family: str, dtype: torch.dtype) -> None:
    model, row = tiny(family).to(dtype), prompts()[0][None]
    delta = drawn(biases(model))
    expected, bare = moved(model, delta)(input_ids=row).logits, model(input_ids=row).logits
    found = wrap(model).logits(row, None, delta)
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - bare).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_folds_into_the_keys_and_values_of_the_changed_decoder(family: str) -> None:
    model, row = tiny(family), prompts()[0]
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    prompt = EmbeddingPrompt(embeddings=noise * 0.1, positions=Positions(text_start=4))
    delta = drawn(biases(model))
    both, oracle = Combined(parts=(prompt, delta)), moved(model, delta)
    vectors = torch.cat([prompt.embeddings, model.get_input_embeddings()(row)])[None]
    expected = oracle(inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2])).logits[0, 4:]
    decoder = wrap(model)
    for received in (both, decoder.fold(both)):
        found = decoder.logits(row[None], None, received)[0]
        assert (found - expected).abs().max() <= TOLERANCE[torch.float32]
    assert (found - decoder.logits(row[None], None, prompt)[0]).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("family", encoder_decoders.CONFIGS)
def test_encoder_decoders_are_those_with_changed_parameters(family: str) -> None:
    """Training offers none there; what changes parameters does not ask what it changes."""
    model, row = encoder_decoders.tiny(family), prompts()[0][None]
    delta, written = drawn(normalizations(model)), torch.tensor([[3, 11, 12]])
    expected = moved(model, delta)(input_ids=row, decoder_input_ids=written).logits
    bare = model(input_ids=row, decoder_input_ids=written).logits
    with changed(model, delta):
        found = model(input_ids=row, decoder_input_ids=written).logits
    assert (found - expected).abs().max() <= TOLERANCE[torch.float32]
    assert (found - bare).abs().max() > EFFECT
    assert torch.equal(model(input_ids=row, decoder_input_ids=written).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "t5_uneven"])
def test_tied_parameters_change_together(family: str) -> None:
    """The vectors of tokens, and the rows of the head that are the same parameter."""
    model = tiny(family) if family == "gpt2" else encoder_decoders.tiny(family)
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    (name,) = (name for name, weight in named_parameters(model).items() if weight is table)
    delta, row = drawn({name: table}), prompts()[0][None]
    inputs = {"input_ids": row} if family == "gpt2" else {"input_ids": row, "decoder_input_ids": row}
    expected, bare = moved(model, delta)(**inputs).logits, model(**inputs).logits
    with changed(model, delta):
        found = model(**inputs).logits
    assert (found - expected).abs().max() <= TOLERANCE[torch.float32]
    assert (found - bare).abs().max() > EFFECT


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_nothing_stays_behind_an_exception(encoder: Load, family: str) -> None:
    backbone = encoder(family)
    model, delta = backbone.release(), drawn(biases(backbone.model))
    before, attributes = memory_digest(model), [sorted(vars(module)) for module in model.modules()]

    def interrupted() -> None:
        with changed(model, delta):
            assert [sorted(vars(module)) for module in model.modules()] != attributes
            # What a checkpoint or an optimizer would see in the middle of a pass.
            assert memory_digest(model) == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert memory_digest(model) == before


def test_deltas_of_another_model_are_refused_and_change_nothing(encoder: Load) -> None:
    backbone, (row, *_) = encoder("bert"), rows("bert")
    bare = backbone.states(row)
    own = next(iter(biases(backbone.model)))
    wrong = ParameterDelta(deltas={own: torch.zeros(64), "encoder.layer.9.output.dense.bias": torch.zeros(64)})
    with pytest.raises(MismatchError, match=r"expected a parameter .*; found"):
        backbone.states(row, wrong)
    assert torch.equal(backbone.states(row), bare)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "modernbert"])
def test_a_delta_is_named_the_same_with_a_head_and_without(plain: Plain, family: str) -> None:
    known = named_parameters(plain(family))
    for name, weight in named_parameters(plain(family).base_model).items():
        assert known[name] is weight
