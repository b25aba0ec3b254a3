"""What `export.json` says of the graph of a decoder."""

from __future__ import annotations

from typing import Any

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.export.report import GRAPH
from prefixkit.serving.report import INPUTS, OUTPUTS


def decoder_parts(decoder: Decoder, baked: bool) -> dict[str, Any]:
    """What is said of a decoder alone."""
    inputs = dict(INPUTS)
    if not takes_positions(decoder.model):
        del inputs["position_ids"]
    return {
        "graph": {"file": GRAPH, "inputs": inputs, "outputs": dict(OUTPUTS)},
        "model": _model(decoder),
        "contract": _contract(decoder, baked),
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


def _contract(decoder: Decoder, baked: bool) -> dict[str, str]:
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
