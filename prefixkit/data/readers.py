"""Examples from files. Every format may be gzipped (`.gz`), is UTF-8, and may hold blank lines, which are skipped.

JSONL (`.jsonl`, `.ndjson`, `.json`), one object a line, in one of two shapes:

    {"input": "name : Blue Spice | area : riverside", "target": "Blue Spice is by the river ."}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

In the first shape `input` stands for whatever fields the task's template names, and others are ignored. `target` may
be a list of references: each becomes an example of its own, and `group_references` finds them together again. In the
second the last message must be the assistant's: it is the target, and what precedes it is the input.

For a task with a verbalizer the first shape has `label` in the place of `target`, which is the word that stands for it.

E2E lines (`.txt`), the format of the E2E data in the code of Prefix-Tuning: `source||target `. The target keeps its
trailing space, and a source's references stand on lines of their own.

A file with another suffix is JSONL when its first line starts with `{`, else E2E lines. Blank targets and blank inputs
are refused; of several fields some may be blank.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from prefixkit.errors import DataError
from prefixkit.spelling import did_you_mean
from prefixkit.task import Fields

Parser = Callable[[str, str, Sequence[str]], "list[Example]"]
_ONE_A_LINE = 'write one object a line (JSONL): {"input": "…", "target": "…"}'


@dataclass(frozen=True)
class Example:
    """One input and one text that should be written for it."""

    fields: Fields
    """`{"input": text}`, the fields that the task's template names, or `{"messages": [...]}`."""
    target: str
    where: str = field(default="example", compare=False)
    """File and line, for messages about it."""


def read_examples(
    path: str | Path, *, fields: Sequence[str] = ("input",), verbalizer: Mapping[str, str] | None = None
) -> list[Example]:
    """The examples of a file, in order.

    Args:
        fields: the ones that the task's template names.
        verbalizer: the word for each label, where the task is to choose one.

    Raises DataError, which names the line, for a missing, empty, malformed or wrongly encoded file.
    """
    path = Path(path)
    parse: Parser | None = None
    examples: list[Example] = []
    for number, line in lines_of(path):
        parse = parse or _parser(path, line, verbalizer)
        examples += parse(line, f"{path}:{number}", fields)
    if not examples:
        raise DataError(path, expected="at least one example", found="an empty file", next_step="write one a line")
    return examples


def data_hash(examples: Sequence[Any]) -> str:
    """The tagged BLAKE3 of the examples in order, whatever file format they came from."""
    digest = blake3()
    for example in examples:
        canonical = {name: value for name, value in vars(example).items() if name != "where"}
        canonical["fields"] = {name: _hashable(value) for name, value in example.fields.items()}
        digest.update(json.dumps(canonical, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
    return "b3-v1:" + digest.hexdigest()


def _hashable(value: Any) -> Any:
    image = hasattr(value, "tobytes")
    return [list(value.shape), blake3(value.tobytes()).hexdigest()] if image else value


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                found, step = f"byte 0x{raw[error.start]:02x}", "save the file as text in UTF-8"
                raise DataError(f"{path}:{number}", expected="UTF-8", found=found, next_step=step) from error
            if line.strip():
                yield number, line


@contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile | BinaryIO]:
    try:
        with path.open("rb") as stored, gzip.open(stored) if path.suffix == ".gz" else stored as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(path, expected="a data file", found="no such file", next_step="check the path") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        step = "pack it again, or name a plain file without .gz"
        raise DataError(path, expected="a gzip file", found=str(error), next_step=step) from error
    except OSError as error:
        found, step = error.strerror or str(error), "name a file that you may read"
        raise DataError(path, expected="a readable file", found=found, next_step=step) from error


def _parser(path: Path, first_line: str, verbalizer: Mapping[str, str] | None) -> Parser:
    if verbalizer is not None:
        return partial(_from_labelled, verbalizer=verbalizer)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _from_json
    if suffix == ".txt":
        return _from_e2e
    return _from_json if first_line.lstrip().startswith("{") else _from_e2e


def _from_e2e(line: str, where: str, fields: Sequence[str]) -> list[Example]:
    parts = line.split("||")
    if len(parts) != 2:
        step = 'write lines so, or objects with "input" and "target" (JSONL); there are no other formats'
        raise DataError(where, expected="source||target", found=quoted(line), next_step=step)
    if tuple(fields) not in (("input",), ("messages",)):
        wanted = " and ".join(map(repr, fields)) or "no field"
        found, step = "an E2E line, which has only 'input'", "write JSONL, or {input} in the task's template"
        raise DataError(where, expected=f"{wanted}, as the task says", found=found, next_step=step)
    return [_example({"input": parts[0]}, parts[1], where)]


def _from_json(line: str, where: str, fields: Sequence[str]) -> list[Example]:
    record = object_in(line, where)
    if "messages" in record and "target" not in record:
        return [_from_messages(record["messages"], where)]
    wanted = ("input",) if tuple(fields) == ("messages",) else tuple(fields)
    inputs = {name: text_in(record, name, where) for name in wanted}
    targets = record.get("target")
    references = targets if isinstance(targets, list) and targets else [text_in(record, "target", where)]
    if not all(isinstance(reference, str) for reference in references):
        raise DataError(where, expected="'target' as text or a list of texts", found=quoted(json.dumps(targets)))
    return [_example(inputs, reference, where) for reference in references]


def _from_labelled(line: str, where: str, fields: Sequence[str], *, verbalizer: Mapping[str, str]) -> list[Example]:
    record = object_in(line, where)
    inputs = {name: text_in(record, name, where) for name in fields}
    label = record.get("label")
    # Labels are often numbers; JSON's true is not 1.
    named = str(label) if isinstance(label, (str, int)) and not isinstance(label, bool) else json.dumps(label)
    if named not in verbalizer:
        expected = f"'label' as one of {', '.join(verbalizer)}"
        raise DataError(where, expected=expected, found=quoted(named), next_step=did_you_mean(named, verbalizer))
    return [_example(inputs, verbalizer[named], where)]


def object_in(line: str, where: str) -> dict[str, Any]:
    """The JSON object in `line`. Raises DataError."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        found = f"{quoted(line)} ({error})"
        raise DataError(where, expected="one JSON object", found=found, next_step=_ONE_A_LINE) from error
    if not isinstance(record, dict):
        raise DataError(where, expected="one JSON object", found=quoted(line), next_step=_ONE_A_LINE)
    return record


def _example(fields: Fields, target: str, where: str) -> Example:
    """The example, unless it says nothing to read or nothing to write."""
    asked = [value if isinstance(value, str) else str(value[-1]["content"]) for value in fields.values()]
    for name, text in (("input", "".join(asked)), ("target", target)):
        if not text.strip():
            step = "fill it in, or remove the line"
            raise DataError(where, expected=f"some text as {name}", found=quoted(text), next_step=step)
    return Example(fields, target, where)


def _from_messages(messages: Any, where: str) -> Example:
    spoken = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not spoken or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            where,
            expected="messages with 'role' and 'content', the last one the assistant's",
            found=quoted(json.dumps(messages, ensure_ascii=False)),
        )
    return _example({"messages": messages[:-1]}, messages[-1]["content"], where)


def text_in(record: Mapping[str, Any], name: str, where: str) -> str:
    """The text called `name` in `record`. Raises DataError."""
    if name not in record:
        raise DataError(
            where,
            expected=f"the field {name!r}",
            found=", ".join(map(repr, record)) or "no field",
            next_step=_rename(name, record),
        )
    if not isinstance(record[name], str):
        found, step = quoted(json.dumps(record[name])), "write a text in quotes"
        raise DataError(where, expected=f"{name!r} as text", found=found, next_step=step)
    return str(record[name])


def _rename(name: str, record: Mapping[str, Any]) -> str:
    guess = did_you_mean(name, record)
    if guess.startswith("did"):
        return f"{guess} Call it {name!r}"
    return f"call one {name!r}" + ("" if name == "target" else ", or name yours in the input_template of a task file")


def quoted(text: str) -> str:
    """`text` in quotes, cut to what a message can hold."""
    return repr(text if len(text) <= 60 else text[:57] + "…")
