"""Labels and tags: the lines of a file, the ids and numbers that become of them, and one sentence for every fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prefixkit.data.answered import COLLATE, encode_answered, read_answered
from prefixkit.data.batches import IGNORED
from prefixkit.data.labelled import LabelledExample, labels_in
from prefixkit.errors import DataError
from prefixkit.task import load_task
from tests.encoders import SPECIAL
from tests.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer(special_tokens=SPECIAL)
LABEL = load_task("classification", TOKENIZER, max_length=64, kind="encoder")
PAIR = load_task("pair-classification", TOKENIZER, max_length=64, kind="encoder")
TAGS = load_task("tagging", TOKENIZER, max_length=64, kind="encoder")
CLS, SEP = TOKENIZER.token_id("<s>"), TOKENIZER.token_id("<|im_end|>")


def ids(text: str) -> list[int]:
    return TOKENIZER.encode_text(text)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_labels_are_texts_or_whole_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "a", "label": "good", "id": 3}', "", '{"label": 0, "text": ""}')
    assert read_answered(path, LABEL) == [LabelledExample({"text": "a"}, "good"), LabelledExample({"text": ""}, "0")]
    assert [example.where for example in read_answered(path, LABEL)] == [f"{path}:1", f"{path}:3"]


def test_tags_are_as_many_as_words(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"tokens": ["Blue", "Spice"], "tags": ["B", "I"]}')
    assert read_answered(path, TAGS) == [LabelledExample({"tokens": ("Blue", "Spice")}, ("B", "I"))]


def test_labels_are_sorted_and_what_is_nothing_comes_first() -> None:
    tagged = [LabelledExample({}, tags) for tags in (("I-A", "O"), ("B-A",))]
    assert labels_in(tagged) == ("O", "B-A", "I-A")
    assert labels_in([LabelledExample({}, label) for label in ("b", "a", "b")]) == ("a", "b")


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        (LABEL, '{"text": "a"}', "'label' as text or a whole number; found 'None'"),
        (LABEL, '{"text": "a", "label": true}', "found 'True'"),
        (LABEL, '{"text": "a", "label": 1.5}', "found '1.5'"),
        (LABEL, '{"text": "a", "label": ""}', "found ''"),
        (LABEL, '{"txt": "a", "label": "x"}', "expected the field 'text'; found 'txt', 'label'"),
        (LABEL, '{"text": ["a"], "label": "x"}', "expected 'text' as text"),
        (PAIR, '{"text_a": "a", "label": "x"}', "expected the field 'text_b'"),
        (LABEL, "[]", "expected one JSON object"),
        (LABEL, '{"text": ', "expected one JSON object"),
        (TAGS, '{"tags": ["O"]}', "expected 'tokens' as a list of texts; found 'None'"),
        (TAGS, '{"tokens": "a b", "tags": ["O", "O"]}', "expected 'tokens' as a list of texts; found 'a b'"),
        (TAGS, '{"tokens": ["a", " "], "tags": ["O", "O"]}', "expected 'tokens' as a list of texts"),
        (TAGS, '{"tokens": [], "tags": []}', "expected 'tokens' as a list of texts"),
        (TAGS, '{"tokens": ["a", "b"], "tags": ["O"]}', "expected a tag for each of 2 tokens; found 1 tags"),
        (TAGS, '{"tokens": ["a"], "tags": [0]}', "expected 'tags' as a list of texts"),
        (replace(LABEL, labels=("bad", "good")), '{"text": "a", "label": "goood"}', "did you mean 'good'?"),
        (replace(TAGS, labels=("O", "B")), '{"tokens": ["a"], "tags": ["I"]}', "one of the labels O, B; found 'I'"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_line(tmp_path: Path, task: object, line: str, message: str) -> None:
    good = '{"tokens": ["a"], "tags": ["O"], "text": "a", "text_a": "a", "text_b": "b", "label": "good"}'
    path = write(tmp_path / "d.jsonl", good, line)
    with pytest.raises(DataError) as error:
        read_answered(path, task)  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{path}:2: expected")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("\n", "an empty file")])
def test_files_without_an_example(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_answered(path, LABEL)


def test_a_label_stands_for_the_whole_input() -> None:
    (row,) = encode_answered(replace(LABEL, labels=("a", "b")), TOKENIZER, [LabelledExample({"text": "Blue"}, "b")])
    assert (row.ids, row.labels, row.truncated) == ((CLS, *ids("Blue"), SEP), (1,), 0)


def test_a_pair_has_a_separator_between() -> None:
    example = LabelledExample({"text_a": "Blue", "text_b": "pub <s>"}, "a")
    (row,) = encode_answered(replace(PAIR, labels=("a", "b")), TOKENIZER, [example])
    assert row.ids == (CLS, *ids("Blue"), SEP, *ids("pub <s>"), SEP)
    assert row.ids.count(CLS) == 1


def test_a_tag_is_learned_at_the_first_token_of_its_word() -> None:
    example = LabelledExample({"tokens": ("near", "Eagle")}, ("O", "B"))
    (row,) = encode_answered(replace(TAGS, labels=("O", "B")), TOKENIZER, [example])
    first, second = ids("near"), ids(" Eagle")
    assert len(first) > 1
    assert row.ids == (CLS, *first, *second, SEP)
    assert row.labels == (IGNORED, 0, *[IGNORED] * (len(first) - 1), 1, *[IGNORED] * len(second))


def test_batches_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    examples = [LabelledExample({"tokens": words}, ("B",) * len(words)) for words in (("pub",), ("pub", "pub"))]
    rows = encode_answered(replace(TAGS, labels=("O", "B")), TOKENIZER, examples)
    batch = COLLATE["tags"](rows)
    short, long = map(len, rows)
    assert batch.inputs["attention_mask"].tolist() == [[1] * short + [0] * (long - short), [1] * long]
    assert batch.labels[0, short:].eq(IGNORED).all()
    assert (batch.tokens, batch.target_tokens, batch.examples) == (short + long, 3, 2)
