from __future__ import annotations

import os
from math import exp, log, log2, sqrt
from pathlib import Path

import pytest

from prefixkit.data.readers import read_examples
from prefixkit.data.references import ReferenceGroup, group_references
from prefixkit.errors import DataError
from prefixkit.training.metrics import generation_scores
from prefixkit.training.metrics.bleu import bleu
from prefixkit.training.metrics.cider import cider
from prefixkit.training.metrics.nist import nist
from prefixkit.training.metrics.rouge_l import rouge_l
from prefixkit.training.metrics.words import coco_words, mteval_words

E2E = Path(os.environ.get("PREFIXKIT_E2E", Path(__file__).parents[3] / "shared" / "data" / "e2e"))


def test_bleu_by_hand() -> None:
    # 5 of 6 words, 3 of 5 pairs, 2 of 4, 1 of 3; nothing is smoothed and nothing is short.
    score = bleu(["The cat sat on the MAT"], [["the cat sat on a mat"]])
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    assert bleu(["the cat sat"], [["the cat sat"]]) == 0


def test_bleu_takes_the_closest_reference_length_of_ragged_references() -> None:
    hypotheses = ["a b c d e", "a b c d e"]
    references = [["a b c d e f g h i"], ["v w x y z", "a b c d e f g h i"]]
    assert bleu(hypotheses, references) == pytest.approx(100 * exp(1 - (9 + 5) / 10))


def test_nist_by_hand() -> None:
    # 9 reference words: a 4 times, b and c twice, d once.
    a, b, c = log2(9 / 4), log2(9 / 2), log2(9 / 2)
    ab, bc, aa = log2(4 / 2), log2(2 / 1), log2(4 / 1)
    abc = log2(2 / 1)
    words = (a + b + c) + 2 * a  # the third a of the second output is one too many
    expected = words / 6 + (ab + bc + aa) / 4 + abc / 2
    assert nist(["a b c", "a a a"], [["a b d", "a b c c"], ["a a"]]) == pytest.approx(expected)


def test_nist_halves_at_two_thirds_of_the_length() -> None:
    assert nist(["a b"], [["a b c"]]) == pytest.approx(log2(3) / 2)
    assert nist([""], [["a b c"]]) == 0


def test_rouge_l_by_hand() -> None:
    # Precision is best with the first reference (4 of 6), recall with the second (3 of 3).
    references = [["the pub by the river .", "Near the river"]]
    precision, recall = 4 / 6, 1.0
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l(["The pub is near the river"], references) == pytest.approx(expected)


def test_rouge_l_at_its_ends() -> None:
    assert rouge_l(["a b c"], [["x", "a b c ."]]) == pytest.approx(1)
    assert rouge_l(["x y", "", "a"], [["a b"], ["a b"], ["."]]) == 0


def test_cider_of_identical_texts_is_ten() -> None:
    texts = ["a b c d", "e f g h i"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx(10)
    assert cider(["a b c d", "x"], [[text] for text in texts]) == pytest.approx(5)


def test_cider_by_hand() -> None:
    references = [["a b c d"], ["e f g h"]]
    half_of_it = 10 * (2 / (sqrt(2) * sqrt(4)) + 1 / sqrt(3)) / 4 * exp(-((1 - 3) ** 2) / (2 * 6**2))
    assert cider(["a b", "x"], references) == pytest.approx(half_of_it / 2)
    clipped = 10 * (1 * 1 / (4 * 2)) / 4
    assert cider(["a a a a", "x"], references) == pytest.approx(clipped / 2)


def test_cider_ignores_what_every_input_says() -> None:
    # "the" stands in both inputs' references, so its weight is log(2 / 2) = 0.
    both = cider(["the a b c d", "x"], [["the e f g h"], ["the i j k l"]])
    assert both == 0
    # Words of 3 and 2 inputs of 3 weigh 0 and log(3 / 2).
    words = 10 * (log(3 / 2) ** 2 / (log(3 / 2) * sqrt(log(3 / 2) ** 2 + log(3) ** 2))) / 4
    assert cider(["a", "x", "x"], [["a b"], ["a c"], ["d e"]]) == pytest.approx(words * exp(-1 / 72) / 3)


def test_words() -> None:
    assert mteval_words("It costs £20, family-friendly.") == ["it", "costs", "£20", ",", "family-friendly", "."]
    assert coco_words("It's a pub ( cheap ) - near 'it' .") == ["it's", "a", "pub", "cheap", "near", "'it'"]


def test_all_scores_together() -> None:
    texts = ["a b c d e", "f g h i j"]
    scores = generation_scores(texts, [[text] for text in texts])
    assert scores == pytest.approx({"bleu": 100, "nist": log2(10), "rouge_l": 100, "cider": 10})


@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], []), (["a", "b"], [["a"], []])])
def test_hypotheses_without_references_are_refused(hypotheses: list[str], references: list[list[str]]) -> None:
    with pytest.raises(DataError, match="expected hypotheses, each with at least one reference"):
        generation_scores(hypotheses, references)


def e2e_test_set() -> list[ReferenceGroup]:
    path = E2E / "test.txt.gz"
    if not path.is_file():
        pytest.fail(f"the E2E test set is not at {path}: set PREFIXKIT_E2E to the folder that holds test.txt.gz")
    return group_references(read_examples(path))


def fixed_template(source: object) -> str:
    facts = dict(fact.split(" : ", 1) for fact in str(source).split(" | "))
    text = f"{facts['name']} is a {facts.get('Type', 'restaurant')}"
    text += f" serving {facts['food']} food" if "food" in facts else ""
    text += f" in the {facts['area']}" if "area" in facts else ""
    return text + (f" near {facts['near']}" if "near" in facts else "") + " ."


@pytest.mark.matrix
def test_first_reference_against_the_others_on_e2e() -> None:
    groups = [group.references for group in e2e_test_set() if len(group.references) > 1]
    assert len(groups) == 616
    scores = generation_scores([first for first, *_ in groups], [others for _, *others in groups])
    assert scores["bleu"] == pytest.approx(61.1766526, abs=1e-6)
    assert scores["nist"] == pytest.approx(8.929005, abs=1e-5)


@pytest.mark.matrix
def test_a_fixed_template_on_e2e() -> None:
    groups = e2e_test_set()
    assert len(groups) == 630
    outputs = [fixed_template(group.fields["input"]) for group in groups]
    scores = generation_scores(outputs, [group.references for group in groups])
    assert scores["bleu"] == pytest.approx(46.9781871, abs=1e-6)
    assert scores["nist"] == pytest.approx(2.071600, abs=1e-5)
