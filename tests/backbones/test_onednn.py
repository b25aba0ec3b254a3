"""Products by oneDNN: what torch's own give, forwards and backwards, whatever stands in the place of a weight."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from prefixkit.backbones import onednn
from prefixkit.backbones.decoder import Decoder
from prefixkit.injections import ParameterDelta, Received
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix
from tests.training.every_kind import prepared

pytestmark = pytest.mark.skipif(not onednn.works(), reason="no processor with x86's instructions, or no oneDNN")
LAYERS = (nn.Linear, Conv1D)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and batches of tests are small."""
    monkeypatch.setattr(onednn, "LEAST", 32)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product that oneDNN is given."""
    seen: list[int] = []
    operator = torch.ops.mkldnn._linear_pointwise

    def counting(states: Tensor, *given: Any) -> Tensor:
        seen.append(len(states))
        return operator(states, *given)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    return seen


def by_onednn(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers).requires_grad_(False)
    onednn.multiply_by_onednn(model)  # type: ignore[arg-type]
    return model


def logits_and_gradients(decoder: Decoder, received: Received, trained: list[Tensor]) -> list[Tensor]:
    logits = decoder.target_logits(**labelled(padded(prompts())), prefix=received)
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), trained)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in the largest number of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def of_prefix(decoder: Decoder) -> list[Tensor]:
    prefix = random_prefix(decoder.model)
    keys, values = (tuple(each.requires_grad_() for each in side) for side in (prefix.keys, prefix.values))
    return logits_and_gradients(decoder, replace(prefix, keys=keys, values=values), [*keys, *values])


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_are_those_of_torch(family: str, rows: list[int]) -> None:
    decoder = wrap(tiny(family).requires_grad_(False))
    expected = of_prefix(decoder)
    assert not rows
    before = [type(module) for module in decoder.model.modules()]
    onednn.multiply_by_onednn(decoder.model)
    assert apart(of_prefix(decoder), expected) <= 1e-4
    assert rows
    decoder.release()
    assert [type(module) for module in decoder.model.modules()] == before


@pytest.mark.parametrize("name", ["h.1.attn.c_attn.bias", "h.1.attn.c_attn.weight"])
def test_gradients_reach_what_stands_in_the_place_of_a_parameter(name: str) -> None:
    decoder = wrap(tiny("gpt2").requires_grad_(False))
    torch.manual_seed(0)
    delta = (0.1 * torch.randn_like(decoder.model.get_parameter(f"transformer.{name}"))).requires_grad_()
    received = ParameterDelta(deltas={name: delta})
    expected = logits_and_gradients(decoder, received, [delta])
    without = decoder.target_logits(**labelled(padded(prompts())))
    onednn.multiply_by_onednn(decoder.model)
    found = logits_and_gradients(decoder, received, [delta])
    assert apart(found, expected) <= 1e-4
    assert (found[0] - without).abs().max() > 0.1


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wide", [False, True])
def test_states_of_any_shape_and_order(layer: type[nn.Module], wide: bool, rows: list[int]) -> None:
    torch.manual_seed(0)
    before = layer(8, 40) if wide else layer(40, 8)
    into = 8 if wide == (layer is nn.Linear) else 40
    model = by_onednn(deepcopy(before))
    shapes = [torch.randn(70, into), torch.randn(5, 20, into).transpose(0, 1), torch.randn(1, into).expand(128, into)]
    for states in shapes:
        found, right = model(states.requires_grad_()), before(states.contiguous())
        assert found.shape == right.shape
        assert torch.allclose(found, right, atol=1e-5)
        # The gradient of a sum is one number that stands for all of them in memory.
        ours, theirs = (torch.autograd.grad(each.sum(), states)[0] for each in (found, right))
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert rows == [96] * 2 + [128] * 4


def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    before = nn.Linear(8, 4).requires_grad_(False)
    model, states = by_onednn(deepcopy(before)), torch.randn(64, 8, requires_grad=True)

    def second(layer: nn.Module) -> Tensor:
        (first,) = torch.autograd.grad(layer(states).pow(3).sum(), states, create_graph=True)
        return torch.autograd.grad(first.square().sum(), states)[0]

    assert apart([second(model)], [second(before)]) <= 1e-4


def test_numbers_of_rows_are_few(rows: list[int]) -> None:
    """Otherwise oneDNN keeps something for every batch of another length, without end."""
    model = by_onednn(nn.Linear(2, 2))
    for number in range(1, 4096, 3):
        assert model(torch.ones(number, 2)).shape == (number, 2)
    assert min(rows) >= onednn.LEAST
    assert max(rows) == 4096
    assert len(set(rows)) <= 64
    assert all(number <= onednn.filled(number) < number + max(onednn.STEP, number // 15) for number in range(1, 9999))


def test_a_batch_is_filled_up_once() -> None:
    model = by_onednn(nn.Linear(2, 2))
    assert [onednn.filling(model, 16, columns) for columns in (70, 71, 72, 129, 131)] == [2, 1, 0, 7, 5]
    assert onednn.filling(model, 15, 71) == 0  # no number of columns is the one that products want
    assert onednn.filling(model, 16, 1) == 0
    assert onednn.filling(nn.Linear(2, 2), 16, 71) == 0


def test_a_batch_that_was_filled_up_has_the_same_logits(rows: list[int]) -> None:
    decoder = wrap(tiny("gpt2").requires_grad_(False))
    batch = labelled(padded([*prompts(), *prompts(), *prompts()[:2]], "right"))
    seen: list[tuple[int, ...]] = []
    decoder.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    expected = decoder.target_logits(**batch)
    onednn.multiply_by_onednn(decoder.model)
    found = decoder.target_logits(**batch)
    assert [shape for shape in seen if shape[0] == 8] == [(8, 22), (8, 24)]  # before it, a look at the model
    assert set(rows) == {8 * 24, onednn.filled(len(found))}
    assert apart([found], [expected]) <= 1e-4


@pytest.mark.parametrize("exchange", [False, True])
def test_a_weight_that_changed_is_not_multiplied_as_it_was(exchange: bool, rows: list[int]) -> None:
    model = by_onednn(nn.Linear(8, 4, bias=False))
    states, layer = torch.ones(64, 8, requires_grad=True), model[0]

    def output_and_gradient() -> list[Tensor]:
        found = model(states)
        return [found.detach(), *torch.autograd.grad(found.sum(), states)]

    before = output_and_gradient()
    if exchange:
        layer.weight.data = layer.weight.data * 2
    else:
        layer.weight.mul_(2)
    assert apart(output_and_gradient(), [2 * each for each in before]) <= 1e-6
    assert len(rows) == 4


def test_what_is_left_to_torch(rows: list[int]) -> None:
    class Own(nn.Linear):
        pass

    states = torch.randn(64, 4)
    by_onednn(Own(4, 4))(states)
    by_onednn(nn.Linear(4, 4).double())(states.double())
    by_onednn(nn.Linear(4, 4, dtype=torch.bfloat16))(states.bfloat16())
    model = by_onednn(nn.Linear(4, 4))
    model(states[: onednn.LEAST - 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(states).dtype == torch.bfloat16
    assert torch.allclose(torch.vmap(model)(states.view(1, 64, 4)), F.linear(states, model[0].weight, model[0].bias))
    torch.export.export(model, (states,))
    assert not rows
    model(states)
    assert rows == [64]


def test_a_weight_that_is_trained_has_its_gradient(rows: list[int]) -> None:
    model = by_onednn(nn.Linear(4, 4))
    model.requires_grad_(True)
    model(torch.ones(64, 4)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.full((4, 4), 64.0))
    assert not rows


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_multiplies_by_weights_of_its_own(copied: Any) -> None:
    model = by_onednn(nn.Linear(4, 4, bias=False), Conv1D(4, 4))
    states, copy = torch.ones(64, 4), copied(model)
    assert torch.equal(copy(states), model(states))
    copy[0].weight.zero_()
    assert copy[0](states).abs().max() == 0
    assert model[0](states).abs().max() > 0


def test_what_others_put_around_a_layer_stays() -> None:
    layer = nn.Linear(4, 4)
    inner = layer.forward
    layer.forward = lambda states: inner(states) + 1  # type: ignore[method-assign]
    model = by_onednn(layer)
    states = torch.ones(64, 4)
    found = model(states)
    onednn.multiply_by_torch(model)  # type: ignore[arg-type]
    assert torch.equal(found, model(states))
    assert torch.allclose(found, F.linear(states, layer.weight, layer.bias) + 1)


def test_keywords_and_inference_mode() -> None:
    model = by_onednn(nn.Linear(4, 4), Conv1D(4, 4))
    states = torch.ones(64, 4)
    with torch.inference_mode():
        inside = model(states)
    assert torch.equal(inside, model(states))
    assert torch.equal(model[0](input=states), model[0](states))
    assert torch.equal(model[1](x=states), model[1](states))


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_the_operator_multiplies_by_itself(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Tensor:
        raise error("no such operator")

    monkeypatch.setattr(onednn, "_linear", gone)
    onednn.works.cache_clear()
    try:
        assert type(by_onednn(nn.Linear(4, 4))[0]) is nn.Linear
    finally:
        onednn.works.cache_clear()


def test_rows_go_one_way_whether_layers_are_computed_again_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST", 64)
    model, plain = by_onednn(nn.Linear(4, 4)), nn.Linear(4, 4)
    chosen = torch.zeros(2, 40, dtype=torch.bool)
    assert onednn.divides(model, chosen)
    assert not onednn.divides(plain, chosen)
    assert not onednn.divides(model, chosen[:, :31])
    chosen[:, :32] = True
    assert not onednn.divides(model, chosen)


@pytest.mark.parametrize(("compiled", "ours"), [("auto", True), ("on", False)])
def test_runs_multiply_so(compiled: str, ours: bool, tmp_path: Path) -> None:
    run = prepared("prefix-tuning", "gpt2", tmp_path, compile=compiled)
    layers = [module for module in run.backbone.model.modules() if isinstance(module, Conv1D)]
    assert {type(layer) is onednn.FrozenConv1D for layer in layers} == {ours}
