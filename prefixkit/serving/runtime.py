"""An exported decoder in onnxruntime, and batches of texts in it whose cache stays where it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixkit.serving.graph import Device as Device
from prefixkit.serving.graph import Graph, cache_shapes, padded, per_layer
from prefixkit.serving.graph_files import check_files
from prefixkit.serving.prefix_table import Array, ServedPrefix, real_slots, stacked
from prefixkit.serving.report import INPUTS, OUTPUTS, ExportedFolder


class Runtime:
    """The graph of an exported folder, loaded once; `start` begins a batch.

    Attributes:
        device: `cuda` or `cpu`, as onnxruntime chose after it tried.
    """

    def __init__(self, folder: ExportedFolder, *, device: Device = "auto", threads: int | None = None) -> None:
        self.layers = folder.backbone.stacks["decoder"]
        self.dtype = np.dtype(folder.dtype)
        self.takes_positions = folder.takes_positions
        check_files(folder.folder, folder.files)
        self.graph = Graph(folder.folder / folder.graph, device, threads)
        plain = [name for name in INPUTS.values() if "%d" not in name]
        self.graph.check(cache_shapes(INPUTS, "past", self.layers), plain, folder.dtype)
        self.device = self.graph.device

    def start(self, prefixes: Sequence[ServedPrefix | None]) -> Decoding:
        """A batch with one row for each prefix, still without text."""
        past = stacked(prefixes, self.layers, self.dtype)
        positions = np.array([prefix.text_start if prefix else 0 for prefix in prefixes], dtype=np.int64)
        return Decoding(self, [self.graph.on_device(array) for array in past], real_slots(prefixes), positions)

    def begin(
        self, prefixes: Sequence[ServedPrefix | None], texts: Sequence[Sequence[int]]
    ) -> tuple[Decoding, Sequence[Sequence[int]]]:
        """A batch, and the token ids to feed it first so that it continues `texts`: all of them."""
        return self.start(prefixes), texts


@dataclass
class Decoding:
    """A batch of texts in progress.

    Attributes:
        past: key and value of each layer, [batch, kv_heads, past, head_dim], on the device.
        mask: [batch, past], 1 where a slot holds a token or a piece of prefix.
        positions: [batch], the position id of each row's next token.
    """

    runtime: Runtime
    past: list[Any]
    mask: Array
    positions: Array

    def feed(self, rows: Sequence[Sequence[int]]) -> Array:
        """Append token ids to each row and return the logits [batch, seq, vocab] of those appended.

        Rows may differ in length and may be empty: shorter ones are padded on the left, where logits mean nothing.
        """
        ids, real = padded(rows)
        position_ids = np.maximum(self.positions[:, None] + real.cumsum(-1) - 1, 0) * real
        self.mask = np.concatenate([self.mask, real], axis=-1)
        self.positions = self.positions + real.sum(-1)
        return self._run(ids, position_ids)

    def _run(self, ids: Array, position_ids: Array) -> Array:
        layers = len(self.runtime.layers)
        arrays = {INPUTS["input_ids"]: ids, INPUTS["attention_mask"]: self.mask}
        if self.runtime.takes_positions:
            arrays[INPUTS["position_ids"]] = position_ids
        past = dict(zip(per_layer(INPUTS, "past", layers), self.past, strict=True))
        present = list(per_layer(OUTPUTS, "present", layers))
        logits, *self.past = self.runtime.graph.run(arrays, past, [OUTPUTS["logits"]], present)
        result: Array = logits.numpy()
        return result
