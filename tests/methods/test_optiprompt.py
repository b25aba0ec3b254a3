"""OptiPrompt: its two starts, and that the vectors are all that it trains and keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefixkit.errors import ConfigError
from prefixkit.methods.optiprompt import Settings, make
from tests.methods.test_prompt_tuning import VOCABULARY, material

SLOTS = replace(material(), slots=3)


def test_random_vectors_are_spread_as_the_vocabularys() -> None:
    vectors = make(Settings(length=4000), replace(SLOTS, slots=4000))().embeddings
    assert (vectors.mean(dim=0) - VOCABULARY.mean(dim=0)).abs().max() < 0.01
    assert abs(vectors.std() / VOCABULARY.std() - 1) < 0.02
    again = make(Settings(length=4000), replace(SLOTS, slots=4000))().embeddings
    other = make(Settings(length=4000), replace(SLOTS, slots=4000, seed=1))().embeddings
    assert torch.equal(vectors, again)
    assert not torch.equal(vectors, other)


def test_a_manual_template_gives_a_vector_for_each_piece() -> None:
    assert torch.equal(make(Settings(length=3, init="manual:abc"), SLOTS)().embeddings, VOCABULARY[[97, 98, 99]])
    with pytest.raises(ConfigError, match="--init manual: expected 3 word pieces, one a slot; found 2; write as many"):
        make(Settings(length=3, init="manual:ab"), SLOTS)
    with pytest.raises(ConfigError, match="--init: expected random or manual:WORDS; found 'manual'"):
        make(Settings(length=3, init="manual"), SLOTS)


def test_only_the_vectors_are_trained_and_kept() -> None:
    method = make(Settings(length=3), SLOTS)
    assert sum(parameter.numel() for parameter in method.parameters()) == 3 * 8
    assert set(method.fold().arrays()) == {"prompt.embeddings"}
    assert method().placement == "slots"
