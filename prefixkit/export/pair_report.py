"""What `export.json` says of an encoder-decoder's two graphs."""

from __future__ import annotations

from typing import Any

from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.serving.pair_names import DECODER_INPUTS, DECODER_OUTPUTS, ENCODER_INPUTS, ENCODER_OUTPUTS

ENCODER = "onnx/encoder_model.onnx"
DECODER = "onnx/decoder_model.onnx"
_SPECIAL = ("bos", "eos", "pad", "decoder_start")


def pair_parts(backbone: EncoderDecoder) -> dict[str, Any]:
    """What is said otherwise, or only, of an encoder-decoder. `graph` is the decoder's."""
    return {
        "graph": {"file": DECODER, "inputs": dict(DECODER_INPUTS), "outputs": dict(DECODER_OUTPUTS)},
        "encoder": {
            "file": ENCODER,
            "inputs": dict(ENCODER_INPUTS),
            "outputs": dict(ENCODER_OUTPUTS),
            "decoder_start_token_id": backbone.model.config.decoder_start_token_id,
        },
        "model": _model(backbone),
        "contract": _CONTRACT,
    }


def _model(backbone: EncoderDecoder) -> dict[str, Any]:
    """The facts of a genai_config.json, under its names."""
    config, stacks = backbone.model.config, backbone.identity.stacks
    described = {
        stack: {
            "hidden_size": backbone.hidden_size,
            "head_size": layers[0].key_dim,
            "num_hidden_layers": len(layers),
            "num_attention_heads": layers[0].kv_heads,
            "num_key_value_heads": layers[0].kv_heads,
        }
        for stack, layers in stacks.items()
    }
    return {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": backbone.context_length,
        **{f"{kind}_token_id": getattr(config, f"{kind}_token_id", None) for kind in _SPECIAL},
        **described,
    }


_CONTRACT = {
    "encoder": "input_ids padded on the right; prefix_key_values.*.encoder are the prefix of its self-attention, "
    "[kv_heads, length, head_dim] a layer, or of length 0; attention_mask over prefix and input_ids",
    "cross": "past_key_values.*.encoder are the prefix of cross-attention, then the encoder's present.*.encoder, as "
    "they are in every step; encoder_attention_mask over both",
    "past": "past_key_values.*.decoder are the prefix of the decoder's self-attention, then the text so far; the text "
    "begins with decoder_start_token_id",
    "attention_mask": "over past and input_ids; 1 for real slots of prefix and text, 0 for padding anywhere",
    "prefix_length": "how many slots of the past, counted from the left, are prefix or padding of a shorter one; 0 "
    "without. Prefixes take no positions: positions are those of the real tokens of the text",
}
"""How to feed the graphs, in sentences."""
