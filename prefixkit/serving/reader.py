"""An exported model that reads, in onnxruntime: final states, and the logits of a head, for texts or for images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from prefixkit.errors import ConfigError, InputError
from prefixkit.prefix import Prefix, load, matches
from prefixkit.serving.graph import Device, Graph, cache_shapes, padded
from prefixkit.serving.graph_files import check_files
from prefixkit.serving.prefix_table import Array, real_slots, stacked
from prefixkit.serving.reader_names import LOGITS, PAST, STATES, past_names
from prefixkit.serving.reader_rows import ServedReading, rectangle, served_reading
from prefixkit.serving.report import ExportedFolder, ReaderParts, read_report
from prefixkit.task import SLOT_ID, load_tokenizer

NOTHING = ServedReading()
"""What a row of the bare model receives; deltas are in the graph, and every row has them."""


@dataclass(frozen=True, eq=False)
class Read:
    """What was computed of a batch.

    Attributes:
        states: [batch, seq, hidden].
        logits: [batch, labels], or [batch, seq, labels] where a head or the vocabulary answers each token; None in a
            graph without a head.
    """

    states: Array
    logits: Array | None


class Reader:
    """An exported folder, loaded once.

    Attributes:
        own: what the folder's file gives a row; None in a folder without one.
        device: `cuda` or `cpu`, as onnxruntime chose after it tried.
    """

    def __init__(
        self, folder: str | Path | ExportedFolder, *, device: Device = "auto", threads: int | None = None
    ) -> None:
        """Load the graph, and the file that came with it.

        Raises:
            InputError: no exported folder, a damaged one, one that writes, or a device that cannot be had.
        """
        self.report = folder if isinstance(folder, ExportedFolder) else read_report(folder)
        self.parts = _parts(self.report)
        self.layers = self.report.backbone.stacks.get("encoder") or self.report.backbone.stacks["decoder"]
        check_files(self.report.folder, self.report.files)
        self.graph = Graph(self.report.folder / self.report.graph, device, threads)
        self.graph.check(cache_shapes(PAST, "past", self.layers), self.parts.inputs, self.report.dtype)
        self.device = self.graph.device
        file = self.report.prefix_file
        self.own = None if file is None else self.reading(load(self.report.folder / file), own=True)

    def reading(self, prefix: Prefix, *, allow_mismatch: bool = False, own: bool = False) -> ServedReading:
        """A loaded file as this graph takes it.

        Raises:
            MismatchError: it was made for another backbone.
            InputError: the graph has no input for something in it.
        """
        # The folder's own file was checked when it was exported.
        matches(prefix, self.report.backbone, allow_mismatch=allow_mismatch or own)
        return served_reading(prefix, self.parts)

    def read(self, rows: Sequence[Sequence[int]] | Array, given: Sequence[ServedReading | None]) -> Read:
        """Read a batch.

        Args:
            rows: token ids of each row, -1 where a slot of its prompt stands; or images [batch, channels, height,
                width], prepared as the task says.
            given: what each row receives. One head answers them all: that of the first row that has one.

        Raises:
            InputError: no row, another number of rows than of what they receive, or rows that the graph cannot read.
        """
        self._check(rows, given)
        received = [one or NOTHING for one in given]
        inputs = self._images(rows, received) if isinstance(rows, np.ndarray) else self._texts(rows, received)
        inputs |= self._head(received)
        past = stacked([one.prefix for one in received], self.layers, np.dtype(np.float32))
        inputs |= dict(zip(past_names(self.layers), past, strict=True))
        outputs = [STATES, *([LOGITS] if self.parts.logits else [])]
        found = [value.numpy() for value in self.graph.run(inputs, {}, outputs, [])]
        return Read(found[0], found[1] if len(found) > 1 else None)

    def _check(self, rows: Sequence[Sequence[int]] | Array, given: Sequence[ServedReading | None]) -> None:
        images, wanted = isinstance(rows, np.ndarray), "pixel_values" in self.parts.inputs
        if len(rows) == 0 or len(rows) != len(given):
            expected, found = "as many rows as of what they receive, at least one", f"{len(rows)} and {len(given)}"
            raise InputError("batch", expected=expected, found=found)
        if images != wanted:
            kinds = {True: "images, an array [batch, channels, height, width]", False: "token ids of each row"}
            raise InputError("batch", expected=kinds[wanted], found=kinds[images])
        for index, (row, one) in enumerate(zip(rows, given, strict=True)):
            if not images:
                self._check_row(f"row {index}", row, one or NOTHING)

    def _check_row(self, where: str, row: Sequence[int], received: ServedReading) -> None:
        slots = sum(1 for token in row if token == SLOT_ID)
        prompts = [received.prompt, None if received.hidden is None else received.hidden[0]]
        placements = (self.parts.placement, self.parts.hidden_placement)
        taken = [prompt for prompt, placed in zip(prompts, placements, strict=True) if placed == "slots"]
        room = max((0 if prompt is None else len(prompt) for prompt in taken), default=0)
        if len(row) == 0 or slots != room:
            expected = f"tokens, {room} of them slots of its prompt (-1)"
            raise InputError(where, expected=expected, found=f"{len(row)} tokens with {slots} slots")
        if any(not 0 <= token < self.report.backbone.vocab_size for token in row if token != SLOT_ID):
            raise InputError(where, expected=f"token ids below {self.report.backbone.vocab_size}", found=f"{max(row)}")

    def _texts(self, rows: Sequence[Sequence[int]], received: Sequence[ServedReading]) -> dict[str, Array]:
        ids, real = padded(rows, left=False)
        prefixes, prompts = self._prompts(received)
        placed = self._placed(_real([one.prompt for one in received]), real) if self.parts.inserts else real
        arrays = {
            "input_ids": ids,
            "attention_mask": np.concatenate([prefixes, placed], axis=1),
            "token_type_ids": self._types(ids),
            "position_ids": self._positions(placed, received),
            **prompts,
        }
        return {name: arrays[name] for name in self.parts.inputs if name in arrays}

    def _images(self, images: Array, received: Sequence[ServedReading]) -> dict[str, Array]:
        prefixes, prompts = self._prompts(received)
        before = [prefixes, *([_real([one.prompt for one in received])] if self.parts.inserts else [])]
        return {
            "pixel_values": images.astype(np.float32),
            "prefix_attention_mask": np.concatenate(before, axis=1),
            **prompts,
        }

    def _prompts(self, received: Sequence[ServedReading]) -> tuple[Array, dict[str, Array]]:
        """[batch, prefix]: 1 for slots of prefixes; and the prompts that the graph takes."""
        width, prompts = self.report.backbone.hidden_size, {}
        if self.parts.placement is not None:
            left = self.parts.inserts
            prompts["prompt_embeddings"] = rectangle([one.prompt for one in received], (width,), left=left)
        if self.parts.hidden_placement is not None:
            shape = (len(self.layers), width)
            prompts["hidden_prompts"] = rectangle([one.hidden for one in received], shape, left=False)
        return real_slots([one.prefix for one in received]), prompts

    def _placed(self, rows: Array, each: Array) -> Array:
        begin = 1 if self.parts.placement == "after_first" else 0
        return np.concatenate([each[:, :begin], rows, each[:, begin:]], axis=1)

    def _positions(self, placed: Array, received: Sequence[ServedReading]) -> Array:
        start = np.array([one.prefix.text_start if one.prefix else 0 for one in received], dtype=np.int64)
        counted: Array = (start[:, None] + placed.cumsum(axis=1) - 1) * placed
        return counted

    def _types(self, ids: Array) -> Array:
        """0 up to the first separator, 1 behind it."""
        if self._separator is None:
            return np.zeros_like(ids)
        separators = (ids == self._separator).astype(np.int64)
        types: Array = np.minimum(separators.cumsum(axis=1) - separators, 1)
        return types

    @cached_property
    def _separator(self) -> int | None:
        return load_tokenizer(self.report.folder).named_id("sep_token")

    def _head(self, received: Sequence[ServedReading]) -> dict[str, Array]:
        if self.parts.head is None:
            return {}
        head = next((one.head for one in received if one.head is not None), None)
        if head is None:
            raise InputError("batch", expected="a row with a head", found="none")
        return {"head.weight": head[0], "head.bias": head[1]}


def _parts(report: ExportedFolder) -> ReaderParts:
    if report.reader is None:
        step = "use `prefixkit generate`"
        raise ConfigError(str(report.folder), expected="a graph that reads", found="one that writes", next_step=step)
    return report.reader


def _real(rows: Sequence[Array | None]) -> Array:
    """[batch, longest]: 1 for the rows of prompts, behind the padding of shorter ones."""
    lengths = np.array([0 if row is None else row.shape[0] for row in rows], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    real: Array = (np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)
    return real
