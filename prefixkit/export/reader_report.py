"""What `export.json` says of the graph of a model that reads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefixkit.backbones.decoder import Decoder
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.export.report import GRAPH
from prefixkit.serving.reader_names import LOGITS, STATES, described
from prefixkit.serving.report import ReaderParts


def reader_parts(backbone: ReadingBackbone, plan: ReaderParts) -> dict[str, Any]:
    """What is said otherwise, or only, of a model that reads."""
    outputs = {STATES: STATES, **({LOGITS: LOGITS} if plan.logits else {})}
    stored = {name: value for name, value in asdict(plan).items() if value is not None}
    return {
        "graph": {"file": GRAPH, "inputs": described(plan.inputs), "outputs": outputs},
        "reader": {**stored, "inputs": list(plan.inputs), "deltas": list(plan.deltas)},
        "model": _model(backbone),
        "contract": _contract(plan),
    }


def _model(backbone: ReadingBackbone) -> dict[str, Any]:
    config, first = backbone.model.config, backbone.geometry[0]
    return {
        "type": config.model_type,
        "context_length": backbone.context_length,
        "decoder" if isinstance(backbone, Decoder) else "encoder": {
            "hidden_size": backbone.hidden_size,
            "head_size": first.key_dim,
            "num_hidden_layers": len(backbone.geometry),
            "num_key_value_heads": first.kv_heads,
        },
    }


_INPUTS = {
    "input_ids": "padded on the right; -1 where a slot of the prompt stands, if it stands in slots",
    "pixel_values": "prepared as preprocessor_config.json says",
    "attention_mask": "over the prefix, then over the text with the prompt in its place: 1 for what is real, 0 for "
    "padding",
    "prefix_attention_mask": "over the prefix, then over the prompt: 1 for real slots, 0 for padding",
    "token_type_ids": "0 up to the first separator, 1 behind it",
    "position_ids": "over the text with the prompt in its place; they count a row's real tokens from 0; behind a "
    "prefix, from its text_start",
    "hidden_prompts": "what is added to the inputs of every layer at its places",
    "head.weight": "the linear map behind the final states, for all rows; head.bias beside it",
}


def _contract(plan: ReaderParts) -> dict[str, str]:
    """How to feed the graph, in sentences."""
    told = {name: sentence for name, sentence in _INPUTS.items() if name in plan.inputs}
    if plan.placement is not None:
        told["prompt_embeddings"] = f"stand where the placement says: {plan.placement}; of length 0 without a prompt"
    if plan.head is not None:
        told["logits"] = f"of the head, which reads these of the final states: {plan.head}"
    elif plan.logits:
        told["logits"] = "of the masked language model, at every token"
    return {**told, "past": "the prefix, [kv_heads, length, head_dim] a layer; of length 0 without a prefix"}
