"""The portable graph of a decoder as the folders of other runtimes take it: flat, beside a prefix in a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.errors import InputError
from prefixkit.format.atomic import replacing_folder
from prefixkit.format.canonical import read_json
from prefixkit.prefix import Prefix, load

GRAPH = "model.onnx"
MARKER = "prefixkit.json"
"""By which a folder of ours is known, and the runtime that it is for: other tools write folders with the same names in
them."""


@dataclass(frozen=True)
class Portable:
    """What was written.

    Attributes:
        prefix: as keys and values, which a prompt has become.
        facts: `graph`, `model` and the rest of what `export.json` says.
    """

    prefix: Prefix
    facts: Mapping[str, Any]


@contextmanager
def runtime_folder(output: Path, runtime: str) -> Iterator[Path]:
    """What `replacing_folder` gives, where only a folder that was written for the same runtime (its title) is replaced.

    Raises InputError for other folders, and as `replacing_folder` does.
    """
    marker = output / MARKER
    if marker.is_file():
        stored = read_json(marker.read_bytes(), marker)
        found = stored.get("runtime") if isinstance(stored, dict) else None
        if found != runtime:
            expected, told = f"a new folder or one for {runtime}", f"one for {found or 'something else'}"
            raise InputError(output, expected=expected, found=told, next_step="choose another folder")
    with replacing_folder(output, marker=MARKER) as folder:
        yield folder


def write_portable(prefix: Prefix, backbone: str, folder: Path, *, dtype: str, runtime: str) -> Portable:
    """Write `model.onnx`, its weights, `MARKER`, configuration and tokenizer of `backbone` into `folder`, which exists.

    Args:
        runtime: its title, for what it cannot take.

    Raises:
        FormatError: something besides keys and values, or a prompt, right before the text of a decoder.
        ParityError: onnxruntime computes something else than PyTorch.
        InputError: as `prefixkit.export.onnx.export_onnx`.
    """
    from prefixkit.export.onnx import export_onnx
    from prefixkit.export.report import PREFIX
    from prefixkit.serving.report import FILE

    refuse_untakeable(prefix, runtime)
    made = folder / "portable"
    export_onnx(prefix, backbone, made, dtype=cast(Literal["float32", "float16"], dtype))
    folded, facts = load(made / PREFIX), json.loads((made / FILE).read_bytes())
    keys_and_values(folded, runtime)
    for file in (made / PREFIX, made / FILE):
        file.unlink()
    for file in [path for path in made.rglob("*") if path.is_file()]:
        file.rename(folder / file.name)
    shutil.rmtree(made)
    told = {
        "version": 1,
        "runtime": runtime,
        **{name: facts[name] for name in ("prefixkit", "backbone", "versions", "parity")},
    }
    (folder / MARKER).write_text(f"{json.dumps(told, indent=2, sort_keys=True)}\n", encoding="utf-8")
    return Portable(folded, facts)


def refuse_untakeable(prefix: Prefix, runtime: str) -> None:
    """Raise FormatError, before any work, for what folding a prompt does not make keys and values of."""
    backbone, records = prefix.manifest.backbone, prefix.manifest.injections
    if "encoder" in backbone.stacks or [record.kind for record in records] != ["embedding_prompt"]:
        keys_and_values(prefix, runtime)
