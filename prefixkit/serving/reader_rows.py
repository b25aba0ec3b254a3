"""What rows of a batch that is read receive, as a session holds it and as arrays of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefixkit.errors import InputError
from prefixkit.format import names
from prefixkit.format.manifest import InjectionRecord, TaskRecord
from prefixkit.prefix import Prefix
from prefixkit.serving.prefix_table import Array, ServedPrefix, converted
from prefixkit.serving.report import ReaderParts


@dataclass(frozen=True, eq=False)
class ServedReading:
    """What one row receives.

    Attributes:
        prefix: keys and values of each layer; None without.
        prompt: [prompt, hidden]; None without.
        hidden: [layers, places, hidden]; None without.
        head: weight [labels, hidden] and bias [labels]; None without.
        task: the usage contract, None where the file states none.
    """

    prefix: ServedPrefix | None = None
    prompt: Array | None = None
    hidden: Array | None = None
    head: tuple[Array, Array] | None = None
    task: TaskRecord | None = None


def served_reading(prefix: Prefix, parts: ReaderParts) -> ServedReading:
    """A loaded file as a graph with these parts takes it.

    Raises:
        InputError: the graph has no input for something in the file, or has it in another place.
    """
    by_kind = {record.kind: record for record in prefix.manifest.injections}
    _refuse_other_parts(prefix, by_kind, parts)
    hidden = None
    if "hidden_prompt" in by_kind:
        stack = by_kind["hidden_prompt"].stack or "encoder"
        layers = range(len(prefix.manifest.backbone.stacks[stack]))
        hidden = np.stack([_plain(prefix, names.hidden(stack, layer)) for layer in layers])
    return ServedReading(
        prefix=_prefix(prefix, by_kind.get("key_value_prefix")),
        prompt=_plain(prefix, names.PROMPT) if "embedding_prompt" in by_kind else None,
        hidden=hidden,
        head=(_plain(prefix, names.HEAD_WEIGHT), _plain(prefix, names.HEAD_BIAS)) if "task_head" in by_kind else None,
        task=prefix.manifest.task,
    )


def _refuse_other_parts(prefix: Prefix, by_kind: dict[str, InjectionRecord], parts: ReaderParts) -> None:
    placements = {"embedding_prompt": parts.placement, "hidden_prompt": parts.hidden_placement}
    for kind, record in by_kind.items():
        wanted, found = placements.get(kind, parts.head), record.placement or record.reads
        if kind in (*placements, "task_head") and wanted != found:
            raise _no_place(prefix, kind, found)
        if record.mode == "replace":
            raise _no_place(prefix, kind, "replace")
    if by_kind["parameter_delta"].names != parts.deltas if "parameter_delta" in by_kind else parts.deltas:
        raise _no_place(prefix, "parameter_delta", "other parameters than the graph's")


def _no_place(prefix: Prefix, kind: str, found: str | None) -> InputError:
    where, step = f"prefix for {prefix.manifest.backbone.name}", "export that file, and use its own graph"
    return InputError(where, expected="what this graph has inputs for", found=f"{kind} ({found})", next_step=step)


def _prefix(prefix: Prefix, record: InjectionRecord | None) -> ServedPrefix | None:
    if record is None or record.stack is None or record.attention is None:
        return None
    tensors = converted(prefix, record.stack, record.attention, np.dtype(np.float32))
    start = record.positions.text_start if record.positions is not None else tensors[0].shape[1]
    return ServedPrefix(tensors, tensors[0].shape[1], start, None)


def _plain(prefix: Prefix, name: str) -> Array:
    return np.ascontiguousarray(prefix.tensors[name].astype(np.float32))


def rectangle(rows: Sequence[Array | None], shape: tuple[int, ...], *, left: bool) -> Array:
    """`rows` [places, hidden] of different lengths as one array, filled with zeros.

    Args:
        shape: what a row has before and behind its places: `(hidden,)`, or `(layers, hidden)`.
        left: fill at the begin, else at the end.
    """
    longest = max((row.shape[-2] for row in rows if row is not None), default=0)
    batch = np.zeros((len(rows), *shape[:-1], longest, shape[-1]), dtype=np.float32)
    for index, row in enumerate(rows):
        if row is not None and row.shape[-2]:
            where = slice(longest - row.shape[-2], None) if left else slice(0, row.shape[-2])
            batch[index, ..., where, :] = row
    return batch
