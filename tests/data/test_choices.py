"""Multiple choice: lines of a file, a row of ids for each choice, and batches of unequal numbers of choices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixkit.data.answered import COLLATE, encode_answered, read_answered
from prefixkit.data.labelled import LabelledExample
from prefixkit.errors import DataError
from prefixkit.task import load_task
from tests.encoders import SPECIAL
from tests.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer(special_tokens=SPECIAL)
TASK = load_task("multiple-choice", TOKENIZER, max_length=64, kind="encoder")
CLS, SEP = TOKENIZER.token_id("<s>"), TOKENIZER.token_id("<|im_end|>")


def ids(text: str) -> list[int]:
    return TOKENIZER.encode_text(text)


def example(text: str, *choices: str, label: int = 0) -> LabelledExample:
    return LabelledExample({"text": text, "choices": choices}, label, "d.jsonl:1")


def test_a_line_has_texts_choices_and_the_number_of_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "It is", "choices": ["a pub", "near"], "label": 1}\n')
    assert read_answered(path, TASK) == [example("It is", "a pub", "near", label=1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": 0}', "expected 'choices' as a list of texts; found 'None'"),
        ('{"text": "a", "choices": ["x", ""], "label": 0}', "expected 'choices' as a list of texts"),
        ('{"text": "a", "choices": ["x"], "label": 0}', "expected two choices or more; found 1"),
        ('{"text": "a", "choices": ["x", "y"], "label": 2}', "expected 'label' from 0 to 1, the number"),
        ('{"text": "a", "choices": ["x", "y"], "label": -1}', "found '-1'"),
        ('{"text": "a", "choices": ["x", "y"], "label": "y"}', "found 'y'"),
        ('{"text": "a", "choices": ["x", "y"], "label": true}', "found 'True'"),
        ('{"text": "a", "choices": ["x", "y"]}', "found 'None'"),
        ('{"texts": "a", "choices": ["x", "y"], "label": 0}', "expected the field 'text'"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError) as error:
        read_answered(path, TASK)
    assert str(error.value).startswith(f"{path}:1: expected")
    assert message in str(error.value)


def test_each_choice_is_read_behind_the_same_text() -> None:
    (row,) = encode_answered(TASK, TOKENIZER, [example("Blue Spice", "pub", "coffee shop", label=1)])
    before = (CLS, *ids("Blue Spice"), SEP)
    assert row.ids == ((*before, *ids("pub"), SEP), (*before, *ids("coffee shop"), SEP))
    assert (row.label, row.truncated, len(row), row.words) == (1, 0, len(row.ids[1]), list(row.ids[1]))


def test_what_is_too_long_loses_the_end_of_the_text_never_of_a_choice() -> None:
    text, choices = "Blue Spice is a pub by the riverside", ("pub", "coffee shop")
    room = 3 + len(ids("coffee shop")) + 4
    (row,) = encode_answered(replace(TASK, max_length=room), TOKENIZER, [example(text, *choices)])
    assert row.ids[1] == (CLS, *ids(text)[:4], SEP, *ids("coffee shop"), SEP)
    assert row.ids[0] == (CLS, *ids(text)[: room - 3 - len(ids("pub"))], SEP, *ids("pub"), SEP)
    assert row.truncated == len(ids(text)) - 4
    with pytest.raises(DataError, match=r"d\.jsonl:1: expected at most 5 tokens; found .* cannot be shortened"):
        encode_answered(replace(TASK, max_length=5), TOKENIZER, [example(text, *choices)])


def test_examples_with_fewer_choices_have_nothing_to_choose_beyond_them() -> None:
    rows = encode_answered(TASK, TOKENIZER, [example("a", "b", "c"), example("a", "b", "c", "d", label=2)])
    batch = COLLATE["choice"](rows)
    assert batch.inputs["input_ids"].shape[0] == 5
    scores = batch.scores(torch.tensor([[1.0], [2.0], [5.0], [4.0], [3.0]]))
    assert scores.tolist() == [[1.0, 2.0, float("-inf")], [5.0, 4.0, 3.0]]
    assert batch.best(scores) == [[1], [0]]
    assert (batch.labels.tolist(), batch.examples, batch.target_tokens) == ([0, 2], 2, 2)
