"""The export of a decoder that writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import refuse_swallowed
from prefixkit.backbones.load import load_decoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.errors import InputError
from prefixkit.export.decoder_report import decoder_parts
from prefixkit.export.folded import folded_file
from prefixkit.export.kind import Export
from prefixkit.export.parity import CaseResult
from prefixkit.export.report import GRAPH
from prefixkit.export.tracing import trace
from prefixkit.export.verify import verify
from prefixkit.format.manifest import InjectionRecord
from prefixkit.injections import KeyValuePrefix, ParameterDelta, injection, part_of
from prefixkit.prefix import Prefix, matches


class DecoderExport(Export):
    """A decoder, its prefix beside the graph or inside it.

    Deltas are in the weights of the graph, so that it serves their file alone: the prefix is inside then, too.
    """

    decoder: Decoder

    def __init__(self, prefix: Prefix | None, *, dtype: str, baked: bool) -> None:
        records = prefix.manifest.injections if prefix is not None else ()
        for record in records:
            _refuse(record)
        deltas = any(record.kind == "parameter_delta" for record in records)
        super().__init__(prefix, dtype=dtype, baked=baked or deltas)

    @property
    def backbone(self) -> Backbone:
        """The decoder."""
        return self.decoder

    def load(self, backbone: Backbone | str | Path, allow_mismatch: bool) -> None:
        """Load the decoder and fold a prompt into keys and values."""
        self.decoder = _decoder(backbone, self.dtype)
        if self.prefix is None:
            return
        matches(self.prefix, self.decoder.identity, allow_mismatch=allow_mismatch)
        self.prefix = folded_file(self.prefix, self.decoder)
        self.received = injection(self.prefix)
        if self._own is not None:
            _refuse_unplaceable(self._own, self.decoder)

    @property
    def _own(self) -> KeyValuePrefix | None:
        return part_of(self.received, KeyValuePrefix)

    def graphs(self) -> Mapping[str, ir.Model]:
        """One graph."""
        baked = self._own if self.baked else None
        return {GRAPH: trace(self.decoder.release(), self.decoder.geometry, baked)}

    def parts(self) -> dict[str, Any]:
        """Inputs, outputs, model and contract."""
        return decoder_parts(self.decoder, self.baked)

    def verify(self, folder: Path) -> tuple[CaseResult, ...]:
        """Compare every logit."""
        return verify(folder, self.decoder, self._own, part_of(self.received, ParameterDelta))


def _refuse(record: InjectionRecord) -> None:
    """Refuse what no past of a decoder can be."""
    found = " ".join(filter(None, (record.kind, record.mode, record.placement)))
    if record.kind == "hidden_prompt" or record.placement in ("after_first", "slots"):
        expected = "keys and values, or a prompt before the text, for a decoder that writes"
        step = "`prefixkit eval` runs it"
        raise InputError("export --onnx", expected=expected, found=found, next_step=step)


def _decoder(backbone: Backbone | str | Path, dtype: str) -> Decoder:
    if isinstance(backbone, Decoder):
        if str(backbone.model.dtype) == f"torch.{dtype}":
            return backbone
        backbone = backbone.folder
    return load_decoder(backbone.folder if isinstance(backbone, Backbone) else backbone, dtype=dtype)


def _refuse_unplaceable(prefix: KeyValuePrefix, decoder: Decoder) -> None:
    refuse_swallowed(decoder.geometry, prefix.length, decoder.identity.name)
    if not takes_positions(decoder.model) and prefix.positions.text_start != prefix.length:
        raise InputError(
            f"prefix for {decoder.identity.name}",
            expected=f"a text that starts at {prefix.length}: the model counts its prefix",
            found=f"one that starts at {prefix.positions.text_start}",
        )
    limit = decoder.context_length
    if limit is not None and prefix.positions.text_start >= limit:
        found = f"a prefix that leaves none of its {limit}"
        raise InputError(decoder.identity.name, expected="room for text in the context", found=found)
