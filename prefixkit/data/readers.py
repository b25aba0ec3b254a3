"""Examples from files. Every format may be gzipped (`.gz`), is UTF-8, and may hold blank lines, which are skipped.

JSONL (`.jsonl`, `.ndjson`, `.json`), one object a line, in one of two shapes:

    {"input": "name : Blue Spice | area : riverside", "target": "Blue Spice is by the river ."}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

In the first shape `input` stands for whatever fields the task's template names, and others are ignored. `target` may
be a list of references: each becomes an example of its own, and `group_references` finds them together again. In the
second the last message must be the assistant's: it is the target, and what precedes it is the input.

E2E lines (`.txt`), the format of the E2E data in the code of Prefix-Tuning: `source||target `. The target keeps its
trailing space, and a source's references stand on lines of their own.

A file with another suffix is JSONL when its first line starts with `{`, else E2E lines.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from prefixkit.errors import DataError
from prefixkit.spelling import did_you_mean
from prefixkit.task import Fields


@dataclass(frozen=True)
class Example:
    """One input and one text that should be written for it."""

    fields: Fields
    """`{"input": text}`, the fields that the task's template names, or `{"messages": [...]}`."""
    target: str
    where: str = field(default="example", compare=False)
    """File and line, for messages about it."""


def read_examples(path: str | Path, *, fields: Sequence[str] = ("input",)) -> list[Example]:
    """The examples of a file, in order; `fields` are the ones that the task's template names.

    Raises DataError, which names the line, for a missing, empty, malformed or wrongly encoded file.
    """
    path = Path(path)
    parse: Callable[[str, str, Sequence[str]], list[Example]] | None = None
    examples: list[Example] = []
    for number, line in _lines(path):
        parse = parse or _parser(path, line)
        examples += parse(line, f"{path}:{number}", fields)
    if not examples:
        raise DataError(path, expected="at least one example", found="an empty file")
    return examples


def data_hash(examples: Sequence[Example]) -> str:
    """The tagged BLAKE3 of the examples in order, whatever file format they came from."""
    digest = blake3()
    for example in examples:
        canonical = {"fields": dict(example.fields), "target": example.target}
        digest.update(json.dumps(canonical, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
    return "b3-v1:" + digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}", expected="UTF-8", found=f"byte 0x{raw[error.start]:02x}") from error
            if line.strip():
                yield number, line


@contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile | BinaryIO]:
    try:
        with path.open("rb") as stored, gzip.open(stored) if path.suffix == ".gz" else stored as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(path, expected="a data file", found="no such file") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(path, expected="a gzip file", found=str(error)) from error
    except OSError as error:
        raise DataError(path, expected="a readable file", found=error.strerror or str(error)) from error


def _parser(path: Path, first_line: str) -> Callable[[str, str, Sequence[str]], list[Example]]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _from_json
    if suffix == ".txt":
        return _from_e2e
    return _from_json if first_line.lstrip().startswith("{") else _from_e2e


def _from_e2e(line: str, where: str, fields: Sequence[str]) -> list[Example]:
    parts = line.split("||")
    if len(parts) != 2 or not parts[1].strip():
        raise DataError(where, expected="source||target", found=_quoted(line))
    if tuple(fields) not in (("input",), ("messages",)):
        raise DataError(where, expected=f"the fields {', '.join(fields)}", found="E2E lines, which have only 'input'")
    return [Example({"input": parts[0]}, parts[1], where)]


def _from_json(line: str, where: str, fields: Sequence[str]) -> list[Example]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError(where, expected="one JSON object", found=f"{_quoted(line)} ({error})") from error
    if not isinstance(record, dict):
        raise DataError(where, expected="one JSON object", found=_quoted(line))
    if "messages" in record and "target" not in record:
        return [_from_messages(record["messages"], where)]
    wanted = ("input",) if tuple(fields) == ("messages",) else tuple(fields)
    inputs = {name: _text(record, name, where) for name in wanted}
    targets = record.get("target")
    references = targets if isinstance(targets, list) and targets else [_text(record, "target", where)]
    if not all(isinstance(reference, str) for reference in references):
        raise DataError(where, expected="'target' as text or a list of texts", found=_quoted(json.dumps(targets)))
    return [Example(inputs, reference, where) for reference in references]


def _from_messages(messages: Any, where: str) -> Example:
    spoken = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not spoken or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            where,
            expected="messages with 'role' and 'content', the last one the assistant's",
            found=_quoted(json.dumps(messages, ensure_ascii=False)),
        )
    return Example({"messages": messages[:-1]}, messages[-1]["content"], where)


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise DataError(
            where,
            expected=f"the field {name!r}",
            found=", ".join(map(repr, record)) or "no field",
            next_step=_rename(name, record),
        )
    if not isinstance(record[name], str):
        raise DataError(where, expected=f"{name!r} as text", found=_quoted(json.dumps(record[name])))
    return str(record[name])


def _rename(name: str, record: Mapping[str, Any]) -> str:
    guess = did_you_mean(name, record)
    return f"{guess} Call it {name!r}" if guess.startswith("did") else ""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
