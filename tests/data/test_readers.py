from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prefixkit.data.readers import Example, data_hash, read_examples
from prefixkit.errors import DataError

GOOD = '{"input": "a", "target": "b"}\n'


def write(path: Path, content: str | bytes) -> Path:
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.ndjson", "d.data", "d.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOOD + "\n  \n" + '{"target": "d ", "id": 7, "input": "caf\u00e9\u2028"}\r\n')
    examples = read_examples(path)
    assert examples == [Example({"input": "a"}, "b"), Example({"input": "caf\u00e9\u2028"}, "d ")]
    assert [example.where for example in examples] == [f"{path}:1", f"{path}:4"]


def test_each_reference_is_an_example(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"input": "a", "target": ["b", "c"]}\n')
    assert read_examples(path) == [Example({"input": "a"}, "b"), Example({"input": "a"}, "c")]


def test_fields_of_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"question": "q", "context": "c", "target": "t"}\n')
    assert read_examples(path, fields=("context", "question")) == [Example({"context": "c", "question": "q"}, "t")]


def test_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write(tmp_path / "d.jsonl", json.dumps({"messages": messages}) + "\n" + GOOD)
    assert read_examples(path, fields=("messages",)) == [
        Example({"messages": messages[:1]}, "Hello"),
        Example({"input": "a"}, "b"),
    ]


@pytest.mark.parametrize("name", ["d.txt", "d.txt.gz", "d"])
def test_e2e_lines_keep_the_space_at_the_end(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "name : A | near : B||A is near B . \nname : C||C . ")
    assert read_examples(path) == [
        Example({"input": "name : A | near : B"}, "A is near B . "),
        Example({"input": "name : C"}, "C . "),
    ]


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "d.txt", b"\xef\xbb\xbfa||b")) == [Example({"input": "a"}, "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "a", ', "expected one JSON object; found"),
        ('["a", "b"]', r"expected one JSON object; found .*; write one object a line \(JSONL\)"),
        ('{"input": "", "target": "b"}', "expected some text as input; found ''; fill it in, or remove the line"),
        ('{"input": " ", "target": ["b", "c"]}', "expected some text as input; found ' '"),
        ('{"input": "a", "target": ""}', "expected some text as target; found ''; fill it in, or remove"),
        ('{"input": "a", "target": ["b", " \\n"]}', "expected some text as target; found"),
        ('{"input": "", "target": ""}', "found ''; fill it in"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
            "some text as target",
        ),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}',
            "some text as input",
        ),
        pytest.param("[" * 100_000, "expected one JSON object; found", id="nested"),
        (r'{"input": "\ud800", "target": "b"}', "expected one JSON object; found .*surrogate"),
        ('{"inputs": "a", "target": "b"}', "the field 'input'; found 'inputs', 'target'; did you mean 'inputs'"),
        ('{"input": "a", "Target": "b"}', "the field 'target'; found 'input', 'Target'; did you mean 'Target'"),
        ('{"input": "a", "summary": "b"}', "the field 'target'; found 'input', 'summary'; call one 'target'$"),
        (
            '{"text": "a", "target": "b"}',
            "found 'text', 'target'; call one 'input', or name yours in the input_template",
        ),
        ('{"input": 3, "target": "b"}', "expected 'input' as text; found '3'"),
        ('{"input": "a", "target": []}', "expected 'target' as text; found"),
        ('{"input": "a", "target": ["b", null]}', "expected 'target' as text or a list of texts"),
        ('{"messages": []}', "the last one the assistant's"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last one the assistant's"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last one the assistant's"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "'role' and 'content'"),
        ("{}", "expected the field 'input'; found no field"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "train.jsonl", GOOD * 16 + line + "\n" + GOOD)
    with pytest.raises(DataError, match=message) as raised:
        read_examples(path)
    assert str(raised.value).startswith(f"{path}:17: expected ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 250


@pytest.mark.parametrize("line", ["no separator", "a||b||c"])
def test_malformed_e2e_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "d.txt", f"a||b\n{line}\n")
    with pytest.raises(DataError, match=r"d\.txt:2: expected source\|\|target; found .*; write lines so, or"):
        read_examples(path)


@pytest.mark.parametrize(("line", "name"), [("a||  ", "target"), (" ||b", "input")])
def test_blank_half_of_an_e2e_line_is_named(tmp_path: Path, line: str, name: str) -> None:
    with pytest.raises(DataError, match=rf"d\.txt:2: expected some text as {name}; found"):
        read_examples(write(tmp_path / "d.txt", f"a||b\n{line}\n"))


def test_one_of_several_fields_may_be_blank(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"question": "q", "context": "", "target": "t"}\n')
    assert read_examples(path, fields=("context", "question"))[0].fields == {"context": "", "question": "q"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'[\n{"input": "a", "target": "b"}\n]\n', r"d\.json:1: .*; write one object a line \(JSONL\)"),
        ("d.json", b'{\n  "input": "a"\n}\n', r"d\.json:1: .*; write one object a line \(JSONL\)"),
        (
            "d.csv",
            b"input,target\na,b\n",
            r"d\.csv:1: .*found 'input,target'; .* \(JSONL\); there are no other formats",
        ),
        (
            "d.jsonl",
            GOOD.encode("utf-16"),
            r"d\.jsonl:1: expected UTF-8; found byte 0xff; save the file as text in UTF-8",
        ),
    ],
)
def test_another_format_is_told_what_there_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path / name, content))


def test_e2e_lines_have_no_other_field(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected 'question', as the task says; found an E2E line.*; write JSONL"):
        read_examples(write(tmp_path / "d.txt", "a||b"), fields=("question",))


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="expected at least one example; found an empty file; write one a line"):
        read_examples(write(tmp_path / "d.jsonl", content))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: expected a data file; found no such file; check the path"):
        read_examples(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"expected a readable file; .*; name a file"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match=r"latin\.txt:2: expected UTF-8; found byte 0xe9"):
        read_examples(write(tmp_path / "latin.txt", b"a||b\ncaf\xe9||b\n"))


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[:-12], lambda raw: b"plain text", lambda raw: raw[:30] + b"\xff" * 9]
)
def test_spoilt_gzip(tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(spoil(gzip.compress((GOOD * 500).encode())))
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: expected a gzip file; .*; pack it again"):
        read_examples(path)


def test_hash_is_of_the_examples_not_of_the_file(tmp_path: Path) -> None:
    lines = read_examples(write(tmp_path / "d.txt.gz", "a||b\na||c\n"))
    objects = read_examples(write(tmp_path / "e.jsonl", '{"target": ["b", "c"], "input": "a"}'))
    assert data_hash(lines) == data_hash(objects)
    assert data_hash(lines).startswith("b3-v1:")
    assert data_hash(lines[::-1]) != data_hash(lines)
    assert data_hash(lines[:1]) != data_hash(lines)
