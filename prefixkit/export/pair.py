"""The export of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.backbones.load import find_folder, load_backbone
from prefixkit.errors import BackboneError, ConfigError, InputError
from prefixkit.export.kind import Export
from prefixkit.export.pair_report import DECODER, ENCODER, pair_parts
from prefixkit.export.pair_tracing import trace_encoder, trace_pair_decoder
from prefixkit.export.pair_verify import verify_pair
from prefixkit.export.parity import CaseResult
from prefixkit.format.digest import read_config
from prefixkit.injections import KeyValuePrefixes, injection
from prefixkit.prefix import Prefix, matches

_STACKS = {"encoder", "decoder"}


def is_pair(backbone: Backbone | str | Path, prefix: Prefix | None) -> bool:
    """Whether an encoder-decoder is to be exported: what the prefix is for says so, else the backbone."""
    if prefix is not None:
        return prefix.manifest.backbone.stacks.keys() == _STACKS
    if isinstance(backbone, Backbone):
        return backbone.paired
    return bool(read_config(find_folder(backbone, None)).get("is_encoder_decoder", False))


class PairExport(Export):
    """An encoder-decoder as two graphs, prefixes in all three places as inputs."""

    pair: EncoderDecoder
    prefixes: KeyValuePrefixes | None = None

    def __init__(self, prefix: Prefix | None, *, dtype: str, baked: bool) -> None:
        _refuse(prefix, dtype, baked)
        super().__init__(prefix, dtype=dtype, baked=baked)

    @property
    def backbone(self) -> Backbone:
        """The encoder-decoder."""
        return self.pair

    def load(self, backbone: Backbone | str | Path, allow_mismatch: bool) -> None:
        """Load the encoder-decoder; its prefixes are keys and values already."""
        self.pair = _loaded(backbone, self.dtype)
        if self.prefix is not None:
            matches(self.prefix, self.pair.identity, allow_mismatch=allow_mismatch)
            folded = self.pair.fold(injection(self.prefix))
            assert isinstance(folded, KeyValuePrefixes)
            self.received = self.prefixes = folded

    def graphs(self) -> Mapping[str, ir.Model]:
        """Both graphs."""
        return trace_pair(self.pair)

    def parts(self) -> dict[str, Any]:
        """Inputs, outputs, model and contract."""
        return pair_parts(self.pair)

    def verify(self, folder: Path) -> tuple[CaseResult, ...]:
        """Compare every logit."""
        return verify_pair(folder, self.pair, self.prefixes)


def trace_pair(backbone: EncoderDecoder) -> Mapping[str, ir.Model]:
    """Both graphs, by file."""
    return {ENCODER: trace_encoder(backbone), DECODER: trace_pair_decoder(backbone)}


def _refuse(prefix: Prefix | None, dtype: str, baked: bool) -> None:
    """Raise InputError, before any work, for what the graphs of an encoder-decoder cannot have."""
    if baked:
        expected, step = "a decoder", "export without --baked: the graphs take any prefix as inputs"
        raise ConfigError("--baked", expected=expected, found="an encoder-decoder", next_step=step)
    if dtype != "float32":
        # T5 keeps some of its weights in float32, and both clamp what overflows.
        raise ConfigError("--dtype", expected="float32 for an encoder-decoder", found=dtype)
    kinds = {record.kind for record in prefix.manifest.injections} if prefix is not None else set()
    others = " and ".join(sorted(kinds - {"key_value_prefix"}))
    if others:
        raise InputError("export --onnx", expected="keys and values for an encoder-decoder", found=others)


def _loaded(backbone: Backbone | str | Path, dtype: str) -> EncoderDecoder:
    """The backbone in `dtype`: itself, or its folder loaded. Raises InputError where it is no encoder-decoder."""
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, dtype=dtype)
    elif str(backbone.model.dtype) != f"torch.{dtype}":
        backbone = load_backbone(backbone.folder, dtype=dtype)
    if not isinstance(backbone, EncoderDecoder):
        where, found = backbone.identity.name, f"a model of the kind {backbone.kind}"
        raise BackboneError(where, expected="an encoder-decoder, as the prefix is for one", found=found)
    return backbone
