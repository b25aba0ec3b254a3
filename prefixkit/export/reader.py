"""The export of a model that reads: an encoder of text or of images, or a decoder below a file's head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import AutoConfig

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.geometry import is_encoder
from prefixkit.backbones.load import find_folder, load_backbone
from prefixkit.errors import BackboneError, ConfigError, InputError
from prefixkit.export.folded import folded_file
from prefixkit.export.kind import Export
from prefixkit.export.parity import CaseResult
from prefixkit.export.reader_plan import ReadingBackbone, plan_of
from prefixkit.export.reader_report import reader_parts
from prefixkit.export.reader_tracing import trace_reader
from prefixkit.export.reader_verify import verify_reader
from prefixkit.export.report import GRAPH
from prefixkit.injections import Injection, injection
from prefixkit.prefix import Prefix, matches
from prefixkit.serving.report import ReaderParts


def is_reader(backbone: Backbone | str | Path, prefix: Prefix | None) -> bool:
    """Whether a graph that reads is to be exported: what the file is for, and has, says so; without one the model."""
    if prefix is not None:
        kinds, stacks = {record.kind for record in prefix.manifest.injections}, prefix.manifest.backbone.stacks.keys()
        return stacks == {"encoder"} or (stacks == {"decoder"} and "task_head" in kinds)
    if isinstance(backbone, Backbone):
        return isinstance(backbone, Encoder)
    try:
        return is_encoder(AutoConfig.from_pretrained(find_folder(backbone, None), trust_remote_code=False))
    except (OSError, ValueError):  # no configuration that says: loading tells what is wrong with it
        return False


class ReaderExport(Export):
    """One graph, with prefixes, prompts and heads as inputs, and deltas in its weights."""

    reading: ReadingBackbone

    def __init__(self, prefix: Prefix | None, *, dtype: str, baked: bool) -> None:
        if baked:
            step = "export without --baked: the graph takes prefixes and heads as inputs"
            expected, found = "a decoder that writes", "a model that reads"
            raise ConfigError("--baked", expected=expected, found=found, next_step=step)
        if dtype != "float32":
            raise ConfigError("--dtype", expected="float32 for a model that reads", found=dtype)
        if prefix is not None and any(record.infix for record in prefix.manifest.injections):
            found, step = "some in slots of it", "`prefixkit eval` runs it"
            raise InputError("export --onnx", expected="keys and values before the text", found=found, next_step=step)
        super().__init__(prefix, dtype=dtype, baked=baked)

    @property
    def backbone(self) -> Backbone:
        """The encoder or the decoder."""
        return self.reading

    def load(self, backbone: Backbone | str | Path, allow_mismatch: bool) -> None:
        """Load the model, and fold what has keys and values of its own."""
        self.reading = _loaded(backbone)
        if self.prefix is None:
            return
        matches(self.prefix, self.reading.identity, allow_mismatch=allow_mismatch)
        # Kept as it is stored: what it is compared with is not folded.
        self.received = injection(self.prefix)
        self.reading.refuse_unplaceable(self.received)
        _refuse_crowded(self.reading, self.received)
        self.prefix = folded_file(self.prefix, self.reading)

    @property
    def plan(self) -> ReaderParts:
        """What the graph takes and gives."""
        return plan_of(self.reading, injection(self.prefix) if self.prefix is not None else None)

    def graphs(self) -> Mapping[str, ir.Model]:
        """One graph."""
        return {GRAPH: trace_reader(self.reading, self.plan)}

    def parts(self) -> dict[str, Any]:
        """Inputs, outputs, model and contract."""
        return reader_parts(self.reading, self.plan)

    def verify(self, folder: Path) -> tuple[CaseResult, ...]:
        """Compare every state and every logit."""
        return verify_reader(folder, self.reading, self.received)


def _loaded(backbone: Backbone | str | Path) -> ReadingBackbone:
    """The backbone in float32: itself, or its folder loaded."""
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone)
    elif backbone.model.dtype != torch.float32:
        backbone = load_backbone(backbone.folder)
    if not isinstance(backbone, (Encoder, Decoder)):
        where, found = backbone.identity.name, f"a model of the kind {backbone.kind}"
        raise BackboneError(where, expected="an encoder or a decoder, as the file is for one", found=found)
    return backbone


def _refuse_crowded(backbone: ReadingBackbone, received: Injection) -> None:
    """Refuse what leaves no room for text in the context, or what a sliding window would swallow."""
    backbone.room_for_text(received.length)
    room = backbone.room_behind(received)
    if room is not None and room < 1:
        found = f"a prefix that leaves none of its {backbone.context_length}"
        raise InputError(backbone.identity.name, expected="room for text in the context", found=found)
