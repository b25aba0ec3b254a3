"""Exact match and F1 of answers against SQuAD's rules, worked out by hand."""

from __future__ import annotations

import pytest

from prefixkit.errors import DataError
from prefixkit.training.metrics.answers import answer_scores, answer_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Blue Spice.", ["blue", "spice"]),
        ("an apple, a day", ["apple", "day"]),
        # Punctuation goes first and leaves no space; articles are whole words.
        ("rock-n-roll's", ["rocknrolls"]),
        ("theatre anthem", ["theatre", "anthem"]),
        ("(the) \u2014 caf\u00e9!", ["\u2014", "caf\u00e9"]),
        ("the", []),
    ],
)
def test_the_words_that_count(text: str, words: list[str]) -> None:
    assert answer_words(text) == words


@pytest.mark.parametrize(
    ("chosen", "right", "f1", "exact"),
    [
        ("the Blue Spice", ["Blue Spice!"], 1.0, 1.0),
        # One of two words right, of one wanted: precision 1/2, recall 1.
        ("Blue pub", ["pub"], 2 / 3, 0.0),
        # Words count as often as they stand: 2 of 3 and 2 of 2.
        ("blue blue blue", ["blue blue"], 0.8, 0.0),
        ("river", ["pub"], 0.0, 0.0),
        # The best of several right answers, for each score.
        ("by the river", ["river", "by river", "near"], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("pub", [], 0.0, 0.0),
        ("", ["pub"], 0.0, 0.0),
        ("the", [], 1.0, 1.0),
        # A right answer without a word that counts is none.
        ("", ["the"], 1.0, 1.0),
    ],
)
def test_scores_by_hand(chosen: str, right: list[str], f1: float, exact: float) -> None:
    assert answer_scores([chosen], [right]) == {"f1": pytest.approx(100 * f1), "exact_match": 100 * exact}


def test_the_mean_is_over_questions() -> None:
    found = answer_scores(["blue", "blue pub", "x"], [["blue"], ["pub"], ["y", "z"]])
    assert found == {"f1": pytest.approx(100 * (1 + 2 / 3) / 3), "exact_match": pytest.approx(100 / 3)}


@pytest.mark.parametrize(("chosen", "right"), [([], []), (["a"], [])])
def test_nothing_to_score_is_refused(chosen: list[str], right: list[list[str]]) -> None:
    with pytest.raises(DataError, match="an answer for every question"):
        answer_scores(chosen, right)
