"""Spans: lines of a file, characters to tokens and back, and which spans a head can choose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.data.answered import COLLATE, encode_answered, read_answered
from prefixkit.data.labelled import LabelledExample
from prefixkit.data.spans import LONGEST
from prefixkit.errors import DataError
from prefixkit.task import load_task
from tests.encoders import SPECIAL
from tests.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer(special_tokens=SPECIAL)
TASK = load_task("question-answering", TOKENIZER, max_length=64, kind="encoder")
CLS, SEP = TOKENIZER.token_id("<s>"), TOKENIZER.token_id("<|im_end|>")
CONTEXT = "Blue Spice is a pub by the riverside ."


def line(**changes: Any) -> str:
    answer = {"text": "a pub", "start": 14}
    return json.dumps({"question": "What?", "context": CONTEXT, "answer": answer, **changes})


def example(answer: str, context: str = CONTEXT) -> LabelledExample:
    answers = ((answer, context.index(answer)),) if answer else ()
    return LabelledExample({"question": "What?", "context": context}, answers, "d.jsonl:1")


def read_one(tmp_path: Path, content: str) -> LabelledExample:
    (tmp_path / "d.jsonl").write_text(content + "\n")
    return read_answered(tmp_path / "d.jsonl", TASK)[0]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ({"text": "a pub", "start": 14}, (("a pub", 14),)),
        ({"text": " a pub ", "start": 13}, (("a pub", 14),)),
        ([{"text": "pub", "start": 16}, {"text": "a pub", "start": 14}], (("pub", 16), ("a pub", 14))),
        ([], ()),
        (None, ()),
    ],
)
def test_answers_are_one_several_or_none(tmp_path: Path, answer: Any, wanted: Any) -> None:
    assert read_one(tmp_path, line(answer=answer)).answer == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(answer="a pub"), "expected 'answer' as"),
        (line(answer={"text": "a pub"}), "expected 'answer' as"),
        (line(answer={"text": "a pub", "start": "14"}), "expected 'answer' as"),
        (line(answer={"text": " ", "start": 4}), "expected 'answer' as"),
        (line(answer={"text": "a pub", "start": 15}), "expected 'a pub' at character 15; found ' pub '"),
        (line(answer={"text": ".", "start": -1}), "expected '.' at character -1; found ''"),
        (line(context=" "), "expected some text as 'context'"),
        (line(context=None), "expected 'context' as text"),
        ('{"question": "q", "context": "c", "answers": []}', "found 'question', 'context', 'answers'; did you mean"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_one(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'd.jsonl'}:1: expected")
    assert message in str(error.value)


@pytest.mark.parametrize("answer", ["Blue Spice", "pub", "a pub by", "riverside .", "iver", CONTEXT])
def test_the_span_covers_the_characters_of_the_answer(answer: str) -> None:
    (row,) = encode_answered(TASK, TOKENIZER, [example(answer)])
    assert row.ids == (
        CLS,
        *TOKENIZER.encode_text("What?"),
        SEP,
        *TOKENIZER.encode_text(CONTEXT),
        SEP,
    )
    first, last = row.span
    covered = CONTEXT[row.places[first][0] : row.places[last][1]]
    assert answer in covered
    assert answer not in CONTEXT[row.places[first + 1][0] : row.places[last][1]]
    assert answer not in CONTEXT[row.places[first][0] : row.places[last - 1][1]]


def test_characters_are_counted_not_bytes() -> None:
    context = "Caf\u00e9 \u65e5\u672c \U0001f600 is near"
    (row,) = encode_answered(TASK, TOKENIZER, [example("\U0001f600 is", context)])
    first, last = row.span
    assert context[row.places[first][0] : row.places[last][1]].strip() == "\U0001f600 is"


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_only_the_text_and_the_first_token_can_be_chosen(kind: str) -> None:
    task = load_task("question-answering", TOKENIZER, max_length=64, kind=kind)
    rows = encode_answered(task, TOKENIZER, [example("pub"), example("", "a pub")])
    batch = COLLATE["span"](rows)
    assert batch.labels.tolist() == [list(rows[0].span), [0, 0]]
    scores = batch.scores(torch.zeros(*batch.inputs["input_ids"].shape, 2))
    for row, chosen in zip(rows, scores[:, 0] > float("-inf"), strict=True):
        text = [index for index, (begin, end) in enumerate(row.places) if begin < end]
        assert chosen.nonzero().flatten().tolist() == [0, *text]
        assert "".join(TOKENIZER.decode([row.ids[index]]) for index in text) in (CONTEXT, "a pub")


def test_no_answer_and_an_answer_that_was_cut_off_are_the_first_token() -> None:
    whole, none, cut = (
        encode_answered(replace(TASK, max_length=size), TOKENIZER, [example(answer)])[0]
        for size, answer in ((64, "riverside"), (64, ""), (14, "riverside"))
    )
    assert whole.span != (0, 0)
    assert (none.span, none.truncated) == ((0, 0), 0)
    assert cut.span == (0, 0)
    assert cut.truncated == len(whole.ids) - 14
    assert cut.ids == (*whole.ids[:13], SEP)
    kept = encode_answered(replace(TASK, max_length=14), TOKENIZER, [example("Blue")])[0]
    assert kept.span == encode_answered(TASK, TOKENIZER, [example("Blue")])[0].span


def test_an_answer_of_which_a_part_was_cut_off_is_not_learned() -> None:
    (whole,) = encode_answered(TASK, TOKENIZER, [example("a pub by")])
    for spared, wanted in ((0, whole.span), (1, (0, 0))):
        room = whole.span[1] + 2 - spared
        (row,) = encode_answered(replace(TASK, max_length=room), TOKENIZER, [example("a pub by")])
        assert row.span == wanted


def test_a_question_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: expected a part of 'context' that fits; found .* tokens too many"
    ):
        encode_answered(replace(TASK, max_length=3), TOKENIZER, [example("pub")])


def scored(size: int, first: int, last: int, also: dict[tuple[int, int], float]) -> Any:
    """The best span of a text of `size` words, each its own character, behind a first token."""
    batch = COLLATE["span"]([row_of(size)])
    outputs = torch.zeros(1, size + 1, 2)
    outputs[0, first, 0] = outputs[0, last, 1] = 5.0
    for (place, side), value in also.items():
        outputs[0, place, side] = value
    return batch.best(batch.scores(outputs))[0]


def row_of(size: int) -> Any:
    (row,) = encode_answered(TASK, TOKENIZER, [example("pub")])
    return replace(row, ids=(CLS,) * (size + 1), places=((0, 0), *((index, index + 1) for index in range(size))))


def test_the_best_span_begins_before_it_ends_and_is_not_too_long() -> None:
    assert scored(50, 3, 7, {}) == [2, 7]
    assert scored(50, 4, 4, {}) == [3, 4]
    # The best end stands before the best begin: 6 to 9 (5 + 4) beats 2 to 4 (3 + 5).
    assert scored(50, 6, 4, {(9, 1): 4.0, (2, 0): 3.0}) == [5, 9]
    assert scored(50, 1, LONGEST, {}) == [0, LONGEST]
    begin, end = scored(50, 1, LONGEST + 1, {(2, 0): 4.0})
    assert (begin, end) == (1, LONGEST + 1)


def test_the_first_token_means_no_answer_and_opens_none() -> None:
    assert scored(9, 0, 0, {}) == [0, 0]
    # A span from the first token to the fifth would have 10.
    assert scored(9, 0, 5, {(4, 0): 1.0}) == [3, 5]
