"""Choosing tokens: what each setting leaves to draw from, and that draws follow the probabilities and the seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from prefixkit.errors import ConfigError
from prefixkit.serving.sampling import GREEDY, Sampler, Sampling

# Probabilities 0.5, 0.3, 0.15, 0.05 in an order that is not theirs.
LOGITS = np.log(np.array([0.15, 0.5, 0.05, 0.3], dtype=np.float32))


def drawn(settings: dict[str, Any], times: int = 400) -> Counter[int]:
    return Counter(Sampler(Sampling(seed=seed, **settings), 0, []).choose(LOGITS) for seed in range(times))


def test_greedy_takes_the_likeliest() -> None:
    assert Sampler(GREEDY, 0, []).choose(LOGITS) == 1


def test_draws_follow_the_probabilities() -> None:
    counts = drawn({"temperature": 1.0}, 4000)
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=0.03)


def test_low_temperature_sharpens_and_high_flattens() -> None:
    assert drawn({"temperature": 0.1})[1] > 390
    assert drawn({"temperature": 100.0})[2] > 60


def test_a_temperature_next_to_zero_takes_the_likeliest() -> None:
    assert set(drawn({"temperature": 1e-320}, 20)) == {1}
    assert set(drawn({"temperature": 1e-320, "top_p": 0.9, "min_p": 0.1, "top_k": 3}, 20)) == {1}


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 0.9}, {0, 1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 0.2}, {0, 1, 3}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),
    ],
)
def test_what_is_left_to_draw_from(settings: dict[str, Any], left: set[int]) -> None:
    assert set(drawn({"temperature": 1.0, **settings})) == left


def test_repetition_penalty_counts_prompt_and_text() -> None:
    assert Sampler(Sampling(repetition_penalty=9.0), 0, [1]).choose(LOGITS) == 3
    sampler = Sampler(Sampling(repetition_penalty=9.0), 0, [])
    assert [sampler.choose(LOGITS) for _ in range(3)] == [1, 3, 0]


def test_row_draws_as_a_single_text_with_its_seed() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    in_batch, alone = Sampler(sampling, 3, []), Sampler(Sampling(temperature=1.0, seed=8), 0, [])
    other = Sampler(sampling, 0, [])
    texts = [[sampler.choose(LOGITS) for _ in range(30)] for sampler in (in_batch, alone, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"temperature": -1.0}, "--temperature: expected 0 or more"),
        ({"temperature": float("nan")}, "--temperature: expected 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k: expected 1 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p: expected above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p: expected above 0"),
        ({"temperature": 1.0, "min_p": -0.1}, "--min-p: expected from 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty: expected from 0.01 to 100"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"top_p": 0.9}, "--temperature: expected above 0 with --top-k, --top-p or --min-p"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        Sampling(**settings)
