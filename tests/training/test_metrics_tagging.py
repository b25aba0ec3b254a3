"""F1 of entities against counts by hand, and against the rules of conlleval and seqeval for every change of tag."""

from __future__ import annotations

import pytest

from prefixkit.errors import DataError
from prefixkit.training.metrics.tagging import entities, tagging_scores


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-A I-A O", [(0, 2, "A")]),
        # Adjacent entities, of one type and of two.
        ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("B-A B-B", [(0, 1, "A"), (1, 2, "B")]),
        # An I- that continues nothing of its type begins an entity.
        ("O I-A I-A O", [(1, 3, "A")]),
        ("I-A I-B", [(0, 1, "A"), (1, 2, "B")]),
        ("B-A I-B I-B", [(0, 1, "A"), (1, 3, "B")]),
        ("B-A O I-A", [(0, 1, "A"), (2, 3, "A")]),
        ("B-A-B I-A-B", [(0, 2, "A-B")]),
        # Without types.
        ("B I O B B", [(0, 2, "_"), (3, 4, "_"), (4, 5, "_")]),
        # Ends and single words marked too.
        ("B-A I-A E-A E-A", [(0, 3, "A"), (3, 4, "A")]),
        ("S-A I-A B-A E-A", [(0, 1, "A"), (1, 2, "A"), (2, 4, "A")]),
        # Tags that are no entities' are one a word.
        ("NOUN NOUN VERB", [(0, 1, "NOUN"), (1, 2, "NOUN"), (2, 3, "VERB")]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities(tags: str, wanted: list[tuple[int, int, str]]) -> None:
    assert list(entities(tags.split())) == wanted


def test_scores_by_hand() -> None:
    right = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    chosen = [["B-A", "I-A", "O", "B-A"], ["B-A", "B-A"]]
    # Found: 4 entities; wanted: 3; both: (0, 0-2, A) and (1, 1-2, A). Tags: 4 of 6.
    assert tagging_scores(chosen, right) == {
        "f1": pytest.approx(100 * 4 / 7),
        "precision": 50.0,
        "recall": pytest.approx(100 * 2 / 3),
        "accuracy": pytest.approx(100 * 4 / 6),
    }


def test_half_an_entity_counts_nothing() -> None:
    found = tagging_scores([["B-A", "O"]], [["B-A", "I-A"]])
    assert (found["f1"], found["accuracy"]) == (0.0, 50.0)


def test_without_entities_f1_is_none() -> None:
    assert tagging_scores([["O", "O"]], [["O", "O"]]) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 100}


@pytest.mark.parametrize(("chosen", "right"), [([], []), ([["O"]], [["O", "O"]]), ([["O"]], [])])
def test_nothing_to_score_is_refused(chosen: list[list[str]], right: list[list[str]]) -> None:
    with pytest.raises(DataError, match="a tag for every word"):
        tagging_scores(chosen, right)
