"""What commands show: tables on a terminal, aligned plain text elsewhere."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from prefixkit.cli.printable import printable

Row = tuple[str, str]
Section = tuple[str, list[Row]]

_BOS = {
    "none": "none anywhere",
    "before": "the prefix holds it already; do not add another",
    "after": "put one between prefix and text",
}
_LEVELS = {
    "weights": "yes: geometry, config and weights agree",
    "config": "yes, as far as can be told: geometry and config agree, the file does not say which weights",
    "geometry": "yes, as far as can be told: the geometry agrees, the file says neither which config nor which weights",
}


def show(report: Mapping[str, Any]) -> None:
    """Print the report of `prefixkit inspect` to standard output."""
    show_sections(list(sections_of(report)))


def show_sections(sections: Sequence[Section]) -> None:
    """Print sections to standard output: tables on a terminal."""
    if sys.stdout.isatty():
        _show_tables(sections)
    else:
        print(plain(sections))


def plain(sections: Sequence[Section]) -> str:
    """Sections as text: a title, then its rows, labels padded to one width."""
    width = max((len(label) for _, rows in sections for label, _ in rows), default=0)
    lines = []
    for title, rows in sections:
        lines += [printable(title), *(f"  {label:<{width}}  {printable(value)}" for label, value in rows), ""]
    return "\n".join(lines).rstrip()


def _show_tables(sections: Sequence[Section]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    width = max((len(label) for _, rows in sections for label, _ in rows), default=0) + 2
    for title, rows in sections:
        console.print(Text(printable(title), style="bold"), overflow="fold")
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="dim", width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(Text(f"  {label}"), Text(printable(value)))
        console.print(table)


def sections_of(report: Mapping[str, Any]) -> Iterator[Section]:
    """What a person wants to know of a prefix file, in the order in which it matters."""
    if report["problems"]:
        problems = [(problem["pointer"] or "/", problem["message"]) for problem in report["problems"]]
        yield f"{report['path']}: {_many(len(problems), 'problem')}", problems
        return
    manifest = report["manifest"]
    size = f"{report['bytes']:,} bytes, schema {manifest['schema']}"
    yield report["path"], [("file", size), ("content", f"{manifest['content']} (verified)"), *_match(report["match"])]
    for index, record in enumerate(manifest["injections"]):
        tensors = [tensor for tensor in report["tensors"] if tensor["injection"] == index]
        yield f"injection: {record['kind']}", list(_injection(record, tensors))
    yield f"backbone: {manifest['backbone']['name']}", list(_backbone(manifest["backbone"]))
    if "task" in manifest:
        yield f"usage: task {manifest['task']['name']}", list(_task(manifest["task"]))
    yield f"provenance: {manifest['provenance']['method']}", list(_provenance(manifest["provenance"]))


def _match(match: Mapping[str, Any] | None) -> Iterator[Row]:
    if match is None:
        return
    yield "fits backbone", _LEVELS[match["level"]] if match["level"] else "no"
    if match["level"] and match["same_tokenizer"] is None:
        yield "tokenizer", "not compared: the prefix or the folder does not say which"


def _injection(record: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    place = ".".join(record[part] for part in ("stack", "attention") if part in record)
    if place:
        yield "into", place
    if "length" in record:
        frozen = f" ({record['frozen_slots']} frozen)" if record.get("frozen_slots") else ""
        yield "length", _many(record["length"], "slot") + frozen
    yield from _positions(record.get("positions"))
    for field in ("placement", "mode", "labels", "slots", "token_ids", "names"):
        if field in record:
            yield field.replace("_", " "), _json(record[field])
    shapes = Counter((tensor["dtype"], tuple(tensor["shape"])) for tensor in tensors)
    told = ", ".join(f"{many} of {dtype} {list(shape)}" for (dtype, shape), many in shapes.items())
    yield "tensors", f"{told}; {sum(tensor['bytes'] for tensor in tensors):,} bytes"


def _positions(positions: Mapping[str, Any] | None) -> Iterator[Row]:
    if positions is not None:
        takes = "takes position ids" if positions["prefix_takes_positions"] else "takes no position ids"
        yield "positions", f"text starts at {positions['text_start']}; the prefix {takes}"


def _backbone(backbone: Mapping[str, Any]) -> Iterator[Row]:
    context = f"context {backbone['context_length']}" if "context_length" in backbone else "no stated context"
    yield (
        "model",
        f"{backbone['family']}, hidden {backbone['hidden_size']}, vocabulary {backbone['vocab_size']}, "
        f"{context}, stored as {backbone['dtype']}",
    )
    if "revision" in backbone:
        yield "revision", backbone["revision"]
    for stack, layers in backbone["stacks"].items():
        yield stack, "; ".join(_runs(layers))
    if "rope" in backbone:
        yield "RoPE", _json(backbone["rope"])
    for level in ("weights", "config", "tokenizer"):
        yield f"{level} hash", backbone.get(f"{level}_hash", "unknown")


def _runs(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for layer, run in groupby(layers):
        dims = f"{layer['key_dim']}" + (f" and {layer['value_dim']}" if layer["key_dim"] != layer["value_dim"] else "")
        window = f", window {layer['window']}" if "window" in layer else ""
        yield f"{_many(len(list(run)), 'layer')} of {_many(layer['kv_heads'], 'key-value head')} of {dims}{window}"


def _task(task: Mapping[str, Any]) -> Iterator[Row]:
    yield "input", _json(task["input_template"])
    yield "separator", _json(task["separator"])
    yield "target", _json(task["target_template"])
    yield "BOS", _BOS[task["bos"]]
    yield "stop", _json(task["stop"])
    yield "max length", _many(task["max_length"], "token") + " of text"
    for field in ("chat_template_hash", "filler_id", "labels", "verbalizer"):
        if field in task:
            yield field.replace("_", " "), _json(task[field])


def _provenance(provenance: Mapping[str, Any]) -> Iterator[Row]:
    yield "made by", f"prefixkit {provenance['prefixkit']}"
    for field in ("seed", "data_hash"):
        if field in provenance:
            yield field.replace("_", " "), str(provenance[field])
    for name, metric in provenance.get("metrics", {}).items():
        yield name.replace("_", " "), f"{metric:g}"
    if provenance.get("config"):
        yield "config", _json(provenance["config"])
    for parent in provenance.get("parents", ()):
        yield "parent", parent


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
