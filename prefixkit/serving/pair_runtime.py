"""An exported encoder-decoder in onnxruntime: sources are read once, then targets are written token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixkit.serving.graph import Device, Graph, cache_shapes, padded, per_layer
from prefixkit.serving.graph_files import check_files
from prefixkit.serving.pair_names import DECODER_INPUTS, DECODER_OUTPUTS, ENCODER_INPUTS, ENCODER_OUTPUTS
from prefixkit.serving.pair_prefix import ServedPrefixes, part
from prefixkit.serving.prefix_table import Array, real_slots, stacked
from prefixkit.serving.report import ExportedFolder


class PairRuntime:
    """The two graphs of an exported folder, loaded once; `start` reads a batch.

    Attributes:
        device: `cuda` or `cpu`, as onnxruntime chose after it tried.
    """

    def __init__(self, folder: ExportedFolder, *, device: Device = "auto", threads: int | None = None) -> None:
        assert folder.encoder is not None
        assert folder.start is not None
        self.first, self.dtype = folder.start, np.dtype(folder.dtype)
        self.read_layers, self.layers = folder.backbone.stacks["encoder"], folder.backbone.stacks["decoder"]
        check_files(folder.folder, folder.files)
        self.encoder = Graph(folder.folder / folder.encoder, device, threads)
        self.decoder = Graph(folder.folder / folder.graph, device, threads)
        self.encoder.check(
            cache_shapes(ENCODER_INPUTS, "prefix", self.read_layers), _plain(ENCODER_INPUTS), folder.dtype
        )
        pasts = [cache_shapes(DECODER_INPUTS, which, self.layers) for which in ("past", "cross_past")]
        self.decoder.check(pasts[0] | pasts[1], _plain(DECODER_INPUTS), folder.dtype)
        self.device = self.decoder.device

    def start(self, prefixes: Sequence[ServedPrefixes | None], sources: Sequence[Sequence[int]]) -> PairDecoding:
        """A batch whose `sources` were read, each behind its own prefix, and whose targets are still empty."""
        ids, real = padded(sources, left=False)
        own, cross = part(prefixes, "decoder.self"), part(prefixes, "decoder.cross")
        past = [self.decoder.on_device(array) for array in stacked(own, self.layers, self.dtype)]
        before, read = stacked(cross, self.layers, self.dtype), self._read(prefixes, ids, real)
        seen = [np.concatenate(pair, axis=2) for pair in zip(before, read, strict=True)]
        mask = real_slots(own)
        return PairDecoding(
            runtime=self,
            past=past,
            cross=[self.decoder.on_device(array) for array in seen],
            mask=mask,
            cross_mask=np.concatenate([real_slots(cross), real], axis=1),
            prefix_length=mask.shape[1],
        )

    def begin(
        self, prefixes: Sequence[ServedPrefixes | None], texts: Sequence[Sequence[int]]
    ) -> tuple[PairDecoding, Sequence[Sequence[int]]]:
        """A batch that has read `texts`, and the token ids to feed it first: the one that every target begins with."""
        return self.start(prefixes, texts), [[self.first]] * len(texts)

    def _read(self, prefixes: Sequence[ServedPrefixes | None], ids: Array, real: Array) -> list[Array]:
        """What cross-attention sees of the sources: key and value of each layer, [batch, kv_heads, seq, head_dim]."""
        own = part(prefixes, "encoder.self")
        names = per_layer(ENCODER_INPUTS, "prefix", len(self.read_layers))
        arrays = {
            ENCODER_INPUTS["input_ids"]: ids,
            ENCODER_INPUTS["attention_mask"]: np.concatenate([real_slots(own), real], axis=1),
        }
        before = [self.encoder.on_device(array) for array in stacked(own, self.read_layers, self.dtype)]
        wanted = list(per_layer(ENCODER_OUTPUTS, "cross_present", len(self.layers)))
        values = dict(zip(names, before, strict=True))
        return [value.numpy() for value in self.encoder.run(arrays, values, wanted, ())]


@dataclass
class PairDecoding:
    """A batch of targets in progress.

    Attributes:
        past: key and value of each decoder layer, [batch, kv_heads, past, head_dim], on the device.
        cross: the same of what was read, [batch, kv_heads, cross, head_dim].
        mask: [batch, past], 1 where a slot holds a token or a piece of prefix.
        cross_mask: [batch, cross].
        prefix_length: how many slots of the past are prefix, or padding before a shorter one.
    """

    runtime: PairRuntime
    past: list[Any]
    cross: list[Any]
    mask: Array
    cross_mask: Array
    prefix_length: int

    def feed(self, rows: Sequence[Sequence[int]]) -> Array:
        """Append token ids to each row and return the logits [batch, seq, vocab] of those appended.

        Rows may differ in length and may be empty: shorter ones are padded on the left, where logits mean nothing.
        """
        ids, real = padded(rows)
        self.mask = np.concatenate([self.mask, real], axis=-1)
        arrays = {
            DECODER_INPUTS["input_ids"]: ids,
            DECODER_INPUTS["attention_mask"]: self.mask,
            DECODER_INPUTS["encoder_attention_mask"]: self.cross_mask,
            DECODER_INPUTS["prefix_length"]: np.array(self.prefix_length, dtype=np.int64),
        }
        layers = len(self.runtime.layers)
        names = [*per_layer(DECODER_INPUTS, "past", layers), *per_layer(DECODER_INPUTS, "cross_past", layers)]
        values = dict(zip(names, [*self.past, *self.cross], strict=True))
        present = list(per_layer(DECODER_OUTPUTS, "present", layers))
        logits, *self.past = self.runtime.decoder.run(arrays, values, [DECODER_OUTPUTS["logits"]], present)
        result: Array = logits.numpy()
        return result


def _plain(names: dict[str, str]) -> list[str]:
    return [name for name in names.values() if "%d" not in name]
