"""The export of a decoder for serving many prefixes at once: graphs that write into buffers (`--target cuda`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors.torch import save_model

from prefixkit.backbones.attention import uses_registry
from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.positions import has_alibi
from prefixkit.errors import ConfigError, FormatError
from prefixkit.export.buffered_report import DECODE, PLACE, SHARED, buffered_parts
from prefixkit.export.buffered_tracing import trace_buffered, trace_place
from prefixkit.export.buffered_verify import verify_buffered
from prefixkit.export.decoder import DecoderExport
from prefixkit.export.emitted import emitted
from prefixkit.export.fused import pack
from prefixkit.export.parity import CaseResult
from prefixkit.export.quantized import Rounded, described, multiply_in_blocks, round_linear, save_rounded
from prefixkit.export.report import GRAPH
from prefixkit.export.rounded_cache import FILE, measured_scales, save_scales
from prefixkit.export.tracing import traceable
from prefixkit.export.weights import Weights, save_graph
from prefixkit.injections import ParameterDelta, part_of
from prefixkit.prefix import Prefix
from prefixkit.serving.cache_scales import CacheScales
from prefixkit.serving.graph import Graph

_HEAD = 8
"""What GroupQueryAttention wants the dimensions of a head to be a multiple of."""


class BufferedExport(DecoderExport):
    """A decoder in four graphs over the same buffers, its prefix beside them."""

    def __init__(
        self,
        prefix: Prefix | None,
        *,
        dtype: str,
        baked: bool,
        quantize: str | None = None,
        kv_cache: str | None = None,
    ) -> None:
        super().__init__(prefix, dtype=dtype, baked=baked)
        self.quantize, self.rounded = quantize, dict[str, Rounded]()
        self.kv_cache: str | None = kv_cache
        self.scales: CacheScales | None = None
        if self.baked:
            found = "--baked" if baked else "a file with deltas, which are exported inside the graph"
            expected, step = "a prefix beside the graph", "use --target portable"
            raise ConfigError("--target cuda", expected=expected, found=found, next_step=step)

    def load(self, backbone: Backbone | str | Path, allow_mismatch: bool) -> None:
        """Load the decoder and fold a prompt into keys and values."""
        if self.quantize is not None and isinstance(backbone, Backbone):
            backbone = backbone.folder  # what is given stays as it is
        super().load(backbone, allow_mismatch)
        model = self.decoder.model
        if not uses_registry(model) or has_alibi(model.config):
            expected = "attention in the registry of transformers, without biases by distance"
            raise ConfigError(
                "--target cuda", expected=expected, found=model.config.model_type, next_step="use --target portable"
            )
        odd = {layer.key_dim for layer in self.decoder.geometry if layer.key_dim % _HEAD}
        if odd:
            expected, found = f"heads of a multiple of {_HEAD} dimensions, for GroupQueryAttention", f"{min(odd)}"
            raise ConfigError("--target cuda", expected=expected, found=found, next_step="use --target portable")
        if self.quantize is not None:
            self.rounded = round_linear(model, self.quantize)
        if self.kv_cache is not None and self.scales is None:
            self.scales = measured_scales(self.decoder, self._own)

    def graphs(self) -> Mapping[str, ir.Model]:
        """One for any number of tokens, one for one token a row, one for rows that share a prefix, one for prefixes."""
        model, geometry = self.decoder.release(), self.decoder.geometry
        with traceable(model), emitted(model):
            graphs = {
                GRAPH: trace_buffered(model, geometry, "scattered", self.scales),
                DECODE: trace_buffered(model, geometry, "grouped", self.scales),
                SHARED: trace_buffered(model, geometry, "shared", self.scales),
                PLACE: trace_place(model, geometry, self.scales),
            }
        for graph in graphs.values():
            multiply_in_blocks(graph, self.rounded)
            pack(graph)
        return graphs

    @property
    def usual_weights(self) -> Weights:
        """The checkpoint's own, where they are of the dtype of the export."""
        own = self.decoder.identity.dtype == self.dtype and self.quantize is None
        return "checkpoint" if own else "external"

    def save(self, graphs: Mapping[str, ir.Model], folder: Path, weights: Weights) -> None:
        """Write `graphs`, with one file of weights for all of them."""
        source = self.decoder.folder
        if weights == "external":
            source = folder / Path(GRAPH).parent
            stored = source / "model.safetensors"
            stored.touch()
            readable = stored.stat().st_mode
            self._save_weights(stored)
            # safetensors keeps what it writes to this user.
            stored.chmod(readable)
        if self.scales is not None:
            save_scales(self.scales, folder / FILE)
        for file, graph in graphs.items():
            save_graph(graph, folder / file, "inline" if file == PLACE else "checkpoint", source)

    def _save_weights(self, path: Path) -> None:
        if self.rounded:
            save_rounded(self.decoder.model, self.rounded, path)
        else:
            save_model(self.decoder.model, str(path))

    def parts(self) -> dict[str, Any]:
        """Inputs, outputs, model and contract."""
        rounded = {} if self.quantize is None else {"quantized": described(self.quantize)}
        return {**buffered_parts(self.decoder, self.scales is not None), **rounded}

    def verify(self, folder: Path) -> tuple[CaseResult, ...]:
        """Compare logits of prompts and of tokens behind them."""
        assert part_of(self.received, ParameterDelta) is None
        return verify_buffered(folder, self.decoder, self._own, self.scales)

    def twin(self, folder: Path) -> BufferedExport | None:
        """The same export in float32, where this machine cannot run bfloat16: its weights are the same to the bit, or
        are rounded alike."""
        if self.dtype != "bfloat16" or _runs_here(folder / PLACE):
            return None
        twin = BufferedExport(self.prefix, dtype="float32", baked=False, quantize=self.quantize, kv_cache=self.kv_cache)
        twin.scales = self.scales
        twin.load(self.decoder.folder, allow_mismatch=True)
        return twin


def _runs_here(graph: Path) -> bool:
    """Whether a graph in bfloat16 runs: onnxruntime knows that of a GPU once it has tried."""
    try:
        return Graph(graph, "auto", None).device == "cuda"
    except FormatError:
        return False
