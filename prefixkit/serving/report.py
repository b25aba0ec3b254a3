"""`export.json`: what an exported folder says of itself, and the names that its graph uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.errors import FormatError, InputError
from prefixkit.format.canonical import read_json
from prefixkit.format.checks import Problem, array, boolean, integer, mapping, one_of, record, text
from prefixkit.format.digest import TREE_TAG
from prefixkit.format.manifest import BackboneIdentity, Manifest, parse, parse_backbone
from prefixkit.format.stored import refuse
from prefixkit.format.validate import BACKBONE, problems
from prefixkit.serving.graph_files import GraphFile

FILE = "export.json"
VERSION = 1

INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
OUTPUTS = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
"""Names of inputs and outputs as optimum and transformers.js know them, under the keys of genai_config.json."""


@dataclass(frozen=True)
class ReaderParts:
    """The inputs and outputs of a graph that reads.

    Attributes:
        inputs: the names of all inputs but keys and values.
        logits: whether a head, or a masked language model, says something of the states.
        placement: where `prompt_embeddings` stand; None without that input.
        hidden_placement: where `hidden_prompts` are added; None without that input.
        head: which states the head reads; None without one.
        deltas: the parameters that have what the folder's file adds to them.
    """

    inputs: tuple[str, ...]
    logits: bool
    placement: str | None
    hidden_placement: str | None
    head: str | None
    deltas: tuple[str, ...]

    @property
    def inserts(self) -> bool:
        """Whether the prompt has places of its own, beside those of the text."""
        return self.placement in ("prepend", "after_first")


@dataclass(frozen=True)
class BufferedParts:
    """The graphs of a model that writes into buffers, beside the one that takes any number of tokens.

    Attributes:
        decode: the file of the one that takes one token a row, or any number of tokens of a single row.
        place: that of the one which puts a prefix at the beginning of rows.
        shared: that of the one whose rows may share a prefix; None in exports of before there was one.
        scales: the file that says what keys and values of eight bits stand for; None where they are not rounded.
    """

    decode: str
    place: str
    shared: str | None = None
    scales: str | None = None


@dataclass(frozen=True)
class ExportedFolder:
    """What serving needs of `export.json`.

    Attributes:
        folder: where it was read.
        backbone: the frozen model in the graph.
        graph: the file, relative to `folder`.
        encoder: the encoder's file, where `graph` is the decoder of an encoder-decoder; None otherwise.
        start: the token that such a decoder begins with.
        reader: what the graph takes and gives where it reads and writes no text; None otherwise.
        buffered: the graphs beside `graph` where it writes into buffers; None otherwise.
        files: those files and what is beside them, as they were exported; none in reports of before they were listed.
        dtype: of past and present, `float32`, `float16` or `bfloat16`.
        takes_positions: whether the graph has the input `position_ids`.
        prefix_file: the prefix beside the graph, relative to `folder`; None without one, or where it is baked.
        prefix: what the exported prefix says of itself, None for a bare backbone.
        baked: whether the prefix is inside the graph.
    """

    folder: Path
    backbone: BackboneIdentity
    graph: str
    files: tuple[GraphFile, ...]
    dtype: str
    takes_positions: bool
    prefix_file: str | None
    prefix: Manifest | None
    baked: bool
    encoder: str | None = None
    start: int | None = None
    reader: ReaderParts | None = None
    buffered: BufferedParts | None = None


def read_report(folder: str | Path) -> ExportedFolder:
    """Read `export.json` in `folder`.

    Raises:
        InputError: no such folder or no report in it.
        FormatError: a report of another version, or one that is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        found = "no such file" if Path(folder).is_dir() else "no such folder"
        step = "write one with `prefixkit export --onnx`"
        raise InputError(path, expected="the report of an exported folder", found=found, next_step=step)
    stored = read_json(path.read_bytes(), path)
    version = stored.get("version") if isinstance(stored, dict) else None
    if version != VERSION:
        raise FormatError(path, expected=f"version {VERSION}", found=f"{version}", next_step="export again")
    refuse(path, list(_problems(stored)), next_step="export again")
    return _parse(Path(folder), stored)


_FILE = text(r"[^./\\:][^/\\:]*(/[^./\\:][^/\\:]*)*", "a file inside the folder")
_GRAPH = record(
    {"file": _FILE, "dtype": one_of(("float32", "float16", "bfloat16")), "inputs": mapping(text())},
    {"files": array(record({"file": _FILE, "bytes": integer(0), "digest": text()}))},
)
_BUFFERED = record({"decode": _FILE, "place": _FILE}, {"shared": _FILE, "scales": _FILE})
_ENCODER = record({"file": _FILE, "decoder_start_token_id": integer(0)})
_PLACEMENT = one_of(("prepend", "after_first", "slots"))
_READER = record(
    {"inputs": array(text()), "logits": boolean, "deltas": array(text())},
    {
        "placement": _PLACEMENT,
        "hidden_placement": _PLACEMENT,
        "head": one_of(("first", "last", "mean", "each")),
    },
)


def _problems(stored: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the parts that serving reads."""
    yield from _GRAPH("/graph", _picked(stored.get("graph"), "file", "dtype", "inputs", "files"))
    found = list(BACKBONE("/backbone", stored.get("backbone")))
    yield from found
    if "buffered" in stored:
        yield from _BUFFERED("/buffered", stored["buffered"])
    if "reader" in stored:
        yield from _READER("/reader", stored["reader"])
    elif not found and "decoder" not in stored["backbone"]["stacks"]:
        yield Problem("/backbone/stacks", "expected a decoder; found none")
    elif not found and "encoder" in stored["backbone"]["stacks"]:
        yield from _ENCODER("/encoder", _picked(stored.get("encoder"), "file", "decoder_start_token_id"))
    prefix = stored.get("prefix")
    if prefix is not None:
        yield from _prefix_problems(prefix)


def _prefix_problems(prefix: Any) -> Iterator[Problem]:
    file = prefix.get("file") if isinstance(prefix, dict) else None
    yield from record({"baked": boolean, "manifest": mapping(_anything)})(
        "/prefix", _picked(prefix, "baked", "manifest")
    )
    yield from _FILE("/prefix/file", file) if file is not None else ()
    manifest = prefix.get("manifest") if isinstance(prefix, dict) else None
    if isinstance(manifest, dict):
        # A prefix that was baked without having been saved has no digest of its own.
        for problem in problems({"content": f"{TREE_TAG}{'0' * 64}", **manifest}):
            yield Problem(f"/prefix/manifest{problem.pointer}", problem.message)


def _anything(pointer: str, value: Any) -> Iterator[Problem]:
    return iter(())


def _picked(stored: Any, *names: str) -> Any:
    """The fields `names` of an object: others are for other readers."""
    return {name: stored[name] for name in names if name in stored} if isinstance(stored, dict) else stored


def _parse(folder: Path, stored: Mapping[str, Any]) -> ExportedFolder:
    graph, prefix = stored["graph"], stored.get("prefix")
    backbone = parse_backbone(stored["backbone"])
    encoder = stored["encoder"] if backbone.stacks.keys() == {"encoder", "decoder"} else {}
    return ExportedFolder(
        folder=folder,
        backbone=backbone,
        graph=graph["file"],
        files=tuple(GraphFile(**file) for file in graph.get("files", ())),
        dtype=graph["dtype"],
        takes_positions="position_ids" in graph["inputs"],
        prefix_file=prefix.get("file") if prefix is not None else None,
        prefix=parse(prefix["manifest"]) if prefix is not None else None,
        baked=prefix is not None and prefix["baked"],
        encoder=encoder.get("file"),
        start=encoder.get("decoder_start_token_id"),
        reader=_reader(stored["reader"]) if "reader" in stored else None,
        buffered=BufferedParts(**stored["buffered"]) if "buffered" in stored else None,
    )


def _reader(stored: Mapping[str, Any]) -> ReaderParts:
    return ReaderParts(
        inputs=tuple(stored["inputs"]),
        logits=stored["logits"],
        placement=stored.get("placement"),
        hidden_placement=stored.get("hidden_placement"),
        head=stored.get("head"),
        deltas=tuple(stored["deltas"]),
    )
