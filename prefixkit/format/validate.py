"""Judging a manifest: every problem at once, each with a JSON pointer.

`structure` says the same as schemas/prefix-v1.schema.json, without a JSON Schema library; a test holds the two
together. What a schema cannot say, such as that a prompt has as many token ids as slots, is in `consistency`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from prefixkit import __version__
from prefixkit.format.checks import (
    LARGEST_INTEGER,
    Check,
    Problem,
    array,
    boolean,
    expected,
    integer,
    mapping,
    number,
    one_of,
    record,
    text,
)
from prefixkit.format.consistency import consistency
from prefixkit.format.manifest import SCHEMA_VERSION
from prefixkit.format.names import STACKS

MOST_PROBLEMS = 1000
"""A damaged file can have a problem a byte; so many are told."""


def problems(document: Any) -> list[Problem]:
    """What is wrong with a manifest: nothing, or every problem with its structure, or else with its consistency."""
    found = list(islice(structure(document), MOST_PROBLEMS))
    return found or list(islice(consistency(document), MOST_PROBLEMS))


def structure(document: Any) -> Iterator[Problem]:
    """The problems that the JSON Schema would find."""
    version = document.get("schema") if isinstance(document, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:
        # Whatever else an unknown version says may mean something else there.
        yield Problem("/schema", _other_version(version))
    else:
        yield from _MANIFEST("", document)


def _other_version(version: int) -> str:
    reads = f"prefixkit {__version__} reads schema {SCHEMA_VERSION}; this file is schema {version}"
    return f"{reads}: upgrade prefixkit" if version > SCHEMA_VERSION else f"{reads}, which never existed"


def _schema(pointer: str, value: Any) -> Iterator[Problem]:
    if type(value) is not int or value != SCHEMA_VERSION:
        yield expected(pointer, f"the schema version {SCHEMA_VERSION}", value)


def _anything(pointer: str, value: Any) -> Iterator[Problem]:
    return iter(())


def _injection(pointer: str, value: Any) -> Iterator[Problem]:
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        yield expected(pointer, f"an injection with a kind ({', '.join(_INJECTIONS)})", value)
    elif kind not in _INJECTIONS:
        unknown = f"prefixkit {__version__} does not know injections of kind {kind[:60]!r}"
        yield Problem(f"{pointer}/kind", f"{unknown}: upgrade prefixkit")
    else:
        yield from _INJECTIONS[kind](pointer, value)


_HEX = "[0-9a-f]{64}"
_TREE = text(f"b3t-v1:{_HEX}", "b3t-v1: and 64 hexadecimal digits")
_HASH = text(f"b3-v1:{_HEX}", "b3-v1: and 64 hexadecimal digits")
_NAME = text(".+", "text that is not empty")
_TEXT = text()
_COUNT = integer(1)
_INDEX = integer(0)
_STACK = one_of(STACKS)
_POSITIONS = record({"text_start": _INDEX, "prefix_takes_positions": boolean})
_PLACEMENT = one_of(("prepend", "after_first", "slots"))
_LAYER = record({"kv_heads": _COUNT, "key_dim": _COUNT, "value_dim": _COUNT}, {"window": _COUNT})


def _kind(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    return record({"kind": _TEXT, **required}, optional)


_INJECTIONS: dict[str, Check] = {
    "key_value_prefix": _kind(
        {"stack": _STACK, "attention": one_of(("self", "cross")), "length": _COUNT, "positions": _POSITIONS},
        {"frozen_slots": _INDEX, "placement": one_of(("prepend", "slots"))},
    ),
    "embedding_prompt": _kind(
        {"stack": _STACK, "length": _COUNT, "placement": _PLACEMENT},
        {"positions": _POSITIONS, "frozen_slots": _INDEX, "token_ids": array(_INDEX)},
    ),
    "hidden_prompt": _kind(
        {"stack": _STACK, "length": _COUNT, "placement": _PLACEMENT, "mode": one_of(("replace", "add"))},
        {"positions": _POSITIONS, "frozen_slots": _INDEX},
    ),
    "parameter_delta": _kind({"names": array(_NAME, least=1, unique=True)}),
    "task_head": _kind({"labels": _COUNT, "reads": one_of(("first", "last", "mean", "each"))}),
}

BACKBONE = record(
    {
        "name": _NAME,
        "family": _NAME,
        "hidden_size": _COUNT,
        "vocab_size": _INDEX,
        "dtype": _NAME,
        "stacks": mapping(array(_LAYER, least=1), names=STACKS, least=1),
    },
    {
        "context_length": _COUNT,
        "config_hash": _HASH,
        "weights_hash": _TREE,
        "tokenizer_hash": _HASH,
        "revision": _TEXT,
        "rope": mapping(_anything),
    },
)

_IMAGE = record(
    {
        "height": _COUNT,
        "width": _COUNT,
        "channels": _COUNT,
        "mean": array(number, least=1),
        "std": array(number, least=1),
    }
)

_TASK = record(
    {
        "name": _TEXT,
        "input_template": _TEXT,
        "separator": _TEXT,
        "target_template": _TEXT,
        "bos": one_of(("none", "before", "after")),
        "stop": array(_TEXT),
        "max_length": _COUNT,
    },
    {
        "chat_template_hash": _HASH,
        "filler_id": _INDEX,
        "labels": array(_TEXT),
        "verbalizer": mapping(_TEXT),
        "answer": one_of(("label", "tags", "choice", "span")),
        "image": _IMAGE,
    },
)

_PROVENANCE = record(
    {"method": _NAME, "prefixkit": _TEXT},
    {
        "config": mapping(_anything),
        "seed": integer(-LARGEST_INTEGER),
        "data_hash": _HASH,
        "metrics": mapping(number),
        "parents": array(_TREE),
    },
)

_MANIFEST = record(
    {
        "schema": _schema,
        "backbone": BACKBONE,
        "injections": array(_injection, least=1),
        "provenance": _PROVENANCE,
        "content": _TREE,
    },
    {"task": _TASK},
)
