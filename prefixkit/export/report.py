"""The document in `export.json`: what another program needs to run the graph, and how it was made and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefixkit import __version__
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.export.pair_report import pair_parts
from prefixkit.export.parity import CaseResult
from prefixkit.export.tracing import OPSET
from prefixkit.export.wrapper import takes_positions
from prefixkit.format.manifest import document
from prefixkit.prefix import Prefix
from prefixkit.serving.graph_files import listed
from prefixkit.serving.report import INPUTS, OUTPUTS, VERSION

GRAPH = "onnx/model.onnx"
PREFIX = "prefix.safetensors"
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "numpy")


def report_document(
    folder: Path, backbone: Decoder | EncoderDecoder, prefix: Prefix | None, *, dtype: str, baked: bool, weights: str
) -> dict[str, Any]:
    """Everything but what verification adds, of the graphs that lie in `folder`."""
    own = pair_parts(backbone) if isinstance(backbone, EncoderDecoder) else _parts(backbone, prefix, baked)
    common = {"opset": OPSET, "dtype": dtype, "logits_dtype": "float32", "weights": weights}
    files = [asdict(file) for file in listed(folder, folder / own["graph"]["file"])]
    return {
        "version": VERSION,
        "prefixkit": __version__,
        "target": "portable",
        "backbone": document(backbone.identity),
        "prefix": None if prefix is None else _prefix(prefix, baked),
        "versions": {**{name: version(name) for name in _PACKAGES}, "onnxruntime": _onnxruntime()},
        **own,
        "graph": {**own["graph"], "files": files, **common},
    }


def with_results(draft: Mapping[str, Any], cases: Sequence[CaseResult], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The whole document: `draft`, parity by case, and what each stage took."""
    return {**draft, "parity": [asdict(case) for case in cases], "seconds": dict(seconds)}


def _parts(decoder: Decoder, prefix: Prefix | None, baked: bool) -> dict[str, Any]:
    """What is said of a decoder alone."""
    inputs = dict(INPUTS)
    if not takes_positions(decoder.model):
        del inputs["position_ids"]
    return {
        "graph": {"file": GRAPH, "inputs": inputs, "outputs": dict(OUTPUTS)},
        "model": _model(decoder),
        "contract": _contract(decoder, prefix, baked),
    }


def _model(decoder: Decoder) -> dict[str, Any]:
    """The facts of a genai_config.json, under its names."""
    config, first = decoder.model.config, decoder.geometry[0]
    return {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": decoder.context_length,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "decoder": {
            "hidden_size": config.hidden_size,
            "head_size": first.key_dim,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": first.kv_heads,
        },
    }


def _prefix(prefix: Prefix, baked: bool) -> dict[str, Any]:
    return {"file": None if baked else PREFIX, "baked": baked, "manifest": document(prefix.manifest)}


def _contract(decoder: Decoder, prefix: Prefix | None, baked: bool) -> dict[str, str]:
    """How to feed the graph, in sentences."""
    covers = "the text" if baked else "prefix and text"
    positions = "the model counts attention_mask; there is no position_ids input"
    if takes_positions(decoder.model):
        positions = "position_ids count a row's real tokens from 0"
        if not baked:
            positions += "; behind a prefix, from its text_start"
    return {
        "attention_mask": f"over past and input_ids; 1 for real slots of {covers}, 0 for padding anywhere",
        "positions": positions,
        "past": "the text so far" if baked else "the prefix, then the text so far; nothing at all without a prefix",
        "prefix": "inside the graph, before every row"
        if baked
        else "[kv_heads, length, head_dim] a layer, as the first past",
    }


def _onnxruntime() -> str:
    # Two distributions bring the same module.
    import onnxruntime

    return str(onnxruntime.__version__)
