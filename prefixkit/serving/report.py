"""`export.json`: what an exported folder says of itself, and the names that its graph uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.errors import FormatError, InputError
from prefixkit.format.canonical import read_json
from prefixkit.format.manifest import BackboneIdentity, Manifest, parse, parse_backbone

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
class ExportedFolder:
    """What serving needs of `export.json`.

    Attributes:
        folder: where it was read.
        backbone: the frozen model in the graph.
        graph: the file, relative to `folder`.
        dtype: of past and present, `float32` or `float16`.
        takes_positions: whether the graph has the input `position_ids`.
        prefix_file: the prefix beside the graph, relative to `folder`; None without one, or where it is baked.
        prefix: what the exported prefix says of itself, None for a bare backbone.
        baked: whether the prefix is inside the graph.
    """

    folder: Path
    backbone: BackboneIdentity
    graph: str
    dtype: str
    takes_positions: bool
    prefix_file: str | None
    prefix: Manifest | None
    baked: bool


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
    try:
        return _parse(Path(folder), stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(path, expected="a whole report", found=f"a damaged one ({error})") from error


def _parse(folder: Path, stored: Mapping[str, Any]) -> ExportedFolder:
    graph, prefix = stored["graph"], stored["prefix"]
    return ExportedFolder(
        folder=folder,
        backbone=parse_backbone(stored["backbone"]),
        graph=graph["file"],
        dtype=graph["dtype"],
        takes_positions="position_ids" in graph["inputs"],
        prefix_file=prefix["file"] if prefix else None,
        prefix=parse(prefix["manifest"]) if prefix else None,
        baked=bool(prefix and prefix["baked"]),
    )
