"""Prefix-Tuning: parameter counts of the paper, exact starts, exact folding, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods import initialization
from prefixkit.methods.prefix_tuning import PrefixTuning
from tests.architectures import WINDOW, tiny
from tests.backbones.test_decoder import wrap


def start(length: int = 5, heads: int = 2, dim: int = 8, layers: int = 3) -> KeyValuePrefix:
    generator = torch.Generator().manual_seed(0)
    return KeyValuePrefix(
        keys=tuple(torch.randn(heads, length, dim, generator=generator) for _ in range(layers)),
        values=tuple(torch.randn(heads, length, dim, generator=generator) for _ in range(layers)),
        positions=Positions(text_start=length),
    )


def difference(one: KeyValuePrefix, other: KeyValuePrefix) -> float:
    pairs = [*zip(one.keys, other.keys, strict=True), *zip(one.values, other.values, strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_training_begins_exactly_at_the_start(reparameterization: str) -> None:
    begin = start()
    assert difference(PrefixTuning(begin, reparameterization=reparameterization)(), begin) == 0.0


def test_folded_mlp_equals_the_unfolded_one() -> None:
    method = PrefixTuning(start(), reparameterization="mlp", hidden=16, bottleneck=12, paper_start=True)
    assert difference(method(), start()) > 0.1
    assert difference(method.fold(), method()) <= 1e-6


@pytest.mark.parametrize("paper_start", [False, True])
@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_frozen_slots_stay_bit_for_bit_while_the_others_learn(reparameterization: str, paper_start: bool) -> None:
    begin = replace(start(), frozen_slots=2)
    method = PrefixTuning(begin, reparameterization=reparameterization, paper_start=paper_start)
    first = method.fold()
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        made = method()
        for part in (*made.keys, *made.values):
            part.pow(2).sum().backward(retain_graph=True)
        optimizer.step()
    folded = method.fold()
    for part in ("keys", "values"):
        for old, initial, new in zip(getattr(begin, part), getattr(first, part), getattr(folded, part), strict=True):
            assert torch.equal(new[:, :2], old[:, :2])
            assert (new[:, 2:] - initial[:, 2:]).abs().min() > 0
    assert (folded.length, folded.frozen_slots, folded.record().frozen_slots) == (5, 2, 2)


def test_frozen_slots_come_back_from_a_state_dict() -> None:
    one = PrefixTuning(replace(start(), frozen_slots=1))
    other = PrefixTuning(replace(one(), frozen_slots=1, keys=tuple(key * 2 for key in one().keys)))
    other.load_state_dict(one.state_dict())
    assert difference(other(), start()) == 0.0
    assert set(PrefixTuning(start()).state_dict()) == {"prefix.prefix"}


def test_a_prefix_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 5 of 5 frozen; use --length 6 or more"):
        PrefixTuning(replace(start(), frozen_slots=5))


def test_layers_of_different_shape_keep_their_shapes() -> None:
    mixed = KeyValuePrefix(
        keys=(torch.randn(2, 4, 8), torch.randn(1, 4, 16)),
        values=(torch.randn(2, 4, 6), torch.randn(1, 4, 16)),
        positions=Positions(text_start=4),
    )
    assert difference(PrefixTuning(mixed)(), mixed) == 0.0


def test_parameter_counts_are_the_papers() -> None:
    """GPT-2 medium with five slots: 245,760 numbers served, about 25.7 million trained through the MLP."""
    medium = KeyValuePrefix(
        keys=tuple(torch.zeros(16, 5, 64) for _ in range(24)),
        values=tuple(torch.zeros(16, 5, 64) for _ in range(24)),
        positions=Positions(text_start=5),
    )
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert count(PrefixTuning(medium)) == 245_760
    trained = count(PrefixTuning(medium, reparameterization="mlp", hidden=1024, bottleneck=512))
    assert trained == 5 * 1024 + (1024 * 512 + 512) + (512 * 24 * 2 * 1024 + 24 * 2 * 1024)


def test_gradient_equals_finite_differences() -> None:
    decoder = wrap(tiny("gpt2").double())
    method = PrefixTuning(initialization.from_text(decoder, [3, 5, 7], 3)).double()
    tokens = torch.tensor([[11, 12, 13, 14, 15]])

    def loss() -> torch.Tensor:
        return torch.log_softmax(decoder.logits(tokens, None, method())[0, -1], 0)[20]

    loss().backward()
    parameter = method.prefix.prefix
    assert parameter.grad is not None
    for index in [(0, 0), (1, 70), (2, 200)]:
        with torch.no_grad():
            parameter[index] += 1e-5
            above = loss()
            parameter[index] -= 2e-5
            below = loss()
            parameter[index] += 1e-5
        assert parameter.grad[index] != 0
        assert parameter.grad[index].item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-5, abs=1e-9)


def test_random_start_has_the_models_own_scale() -> None:
    decoder = wrap(tiny("llama"))
    words = list(range(1, 60))
    assert decoder.longest_text == 128
    text = decoder.key_values_of(words)
    drawn = initialization.random_like(decoder, words, 400, seed=0)
    assert drawn.length == drawn.positions.text_start == 400
    for real, random in zip([*text.keys, *text.values], [*drawn.keys, *drawn.values], strict=True):
        assert random.std().item() == pytest.approx(real.std().item(), rel=0.1)
    assert difference(drawn, initialization.random_like(decoder, words, 400, seed=0)) == 0.0
    assert difference(drawn, initialization.random_like(decoder, words, 400, seed=1)) > 0.1


@pytest.mark.parametrize(("family", "longest"), [("mistral_window", WINDOW - 1), ("gpt2", 128)])
def test_random_start_takes_no_more_text_than_the_backbone_does(family: str, longest: int) -> None:
    """A first example as long as the window is no reason to refuse a prefix of four slots."""
    decoder = wrap(tiny(family))
    words = list(range(1, 200))
    assert decoder.longest_text == longest
    drawn = initialization.random_like(decoder, words, 4, seed=0)
    assert drawn.length == drawn.positions.text_start == 4
    assert difference(drawn, initialization.random_like(decoder, words[:longest], 4, seed=0)) == 0.0


def test_short_text_is_repeated_and_long_text_is_cut() -> None:
    decoder = wrap(tiny("gpt2"))
    assert difference(initialization.from_text(decoder, [4, 5], 5), decoder.key_values_of([4, 5, 4, 5, 4])) == 0.0
    assert difference(initialization.from_text(decoder, [4, 5, 6], 2), decoder.key_values_of([4, 5])) == 0.0


def test_zeros_are_not_the_base_model() -> None:
    """A zero key still takes exp(0) of the attention."""
    decoder = wrap(tiny("gpt2"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    zero = initialization.zeros(decoder, 4)
    shifted = decoder.release()(input_ids=tokens, position_ids=torch.arange(4, 8)[None]).logits
    assert max(key.abs().max() for key in zero.keys) == 0.0
    assert (decoder.logits(tokens, None, zero) - shifted).abs().max() > 1e-3


def test_unknown_reparameterization_is_named() -> None:
    with pytest.raises(ConfigError, match="expected none or mlp; found lstm"):
        PrefixTuning(start(), reparameterization="lstm")
