"""P-Tuning: its two networks, exact starts, and folding."""

from __future__ import annotations

import pytest
import torch

from prefixkit.errors import ConfigError
from prefixkit.methods.p_tuning import ENCODERS, PromptEncoder, Settings, make
from prefixkit.methods.prompt_tuning import PromptTuning
from tests.methods.test_prompt_tuning import VOCABULARY, material


@pytest.mark.parametrize("encoder", ENCODERS)
def test_words_are_an_exact_start(encoder: str) -> None:
    method = make(Settings(length=3, init="text", encoder=encoder), material(bos_id=1))
    assert torch.equal(method().embeddings, VOCABULARY[[1, 5, 6]])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_folded_equals_unfolded_and_every_vector_learns(encoder: str) -> None:
    torch.manual_seed(0)
    network = PromptEncoder(torch.zeros(5, 64), encoder=encoder, exact_start=False)
    method = PromptTuning(torch.zeros(5, 64), network=network)
    made = method().embeddings
    assert (method.fold().embeddings - made).abs().max() <= 1e-6
    assert made.std() > 1e-3
    made.pow(2).sum().backward()
    gradient = network.embedding.weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(dim=1) > 0).all()


def test_lstm_mixes_vectors_and_mlp_does_not() -> None:
    """A vector of the LSTM's prompt depends on its neighbours, which is what the paper wants of it."""
    for encoder, mixes in (("lstm", True), ("mlp", False)):
        torch.manual_seed(0)
        network = PromptEncoder(torch.zeros(5, 8), encoder=encoder, exact_start=False)
        network()[0].sum().backward()
        assert network.embedding.weight.grad is not None
        assert bool(network.embedding.weight.grad[4].abs().sum() > 0) is mixes


def test_parameter_counts_are_those_of_the_official_code() -> None:
    """The LSTM of the LAMA part: 2 layers, both directions, hidden / 2 each; then two square layers."""
    hidden, half = 8, 4
    directions = 4 * half * (hidden + half) + 8 * half
    count = 5 * hidden + 2 * 2 * directions + 2 * (hidden * hidden + hidden)
    network = PromptEncoder(torch.zeros(5, hidden), encoder="lstm", exact_start=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_other_starts_are_refused() -> None:
    with pytest.raises(ConfigError, match="--init: expected random or text or text:WORDS; found 'vocabulary'"):
        make(Settings(init="vocabulary"), material())
