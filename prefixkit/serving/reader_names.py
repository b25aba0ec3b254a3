"""Names and dimensions of the inputs and outputs of a graph that reads: an encoder's, or any model's with a head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.graph import per_layer
from prefixkit.serving.report import INPUTS as DECODER_INPUTS

BATCH, LABELS = "batch_size", "labels"
SEQ, PLACED, SEEN = "sequence_length", "placed_sequence_length", "total_sequence_length"
"""The text, with the prompt in it, and with the prefix before it."""
PREFIX, PROMPT, PLACES, BEFORE = "prefix_length", "prompt_length", "places", "prefix_and_prompt_length"
FREE = (BATCH, LABELS, SEQ, PLACED, SEEN, PREFIX, PROMPT, PLACES, BEFORE)
"""The dimensions that may have any size."""

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "input_ids": (BATCH, SEQ),
    "pixel_values": (BATCH, "channels", "height", "width"),
    "attention_mask": (BATCH, SEEN),
    "prefix_attention_mask": (BATCH, BEFORE),
    "token_type_ids": (BATCH, SEQ),
    "position_ids": (BATCH, PLACED),
    "prompt_embeddings": (BATCH, PROMPT, "hidden"),
    "hidden_prompts": (BATCH, "layers", PLACES, "hidden"),
    "head.weight": (LABELS, "hidden"),
    "head.bias": (LABELS,),
}
"""Of every input but keys and values, in the order of a graph."""
PAST = {name: pattern for name, pattern in DECODER_INPUTS.items() if "%d" in pattern}
"""Names of the prefix's keys and values: those that the past has in the graph of a decoder."""
STATES, LOGITS = "last_hidden_state", "logits"


def past_names(layers: Sequence[LayerGeometry]) -> Iterator[str]:
    """The names of key and value of each layer."""
    return per_layer(PAST, "past", len(layers))


def described(names: Iterable[str]) -> dict[str, str]:
    """The inputs as `export.json` lists them; keys and values by their pattern."""
    return {**{name: name for name in names}, **PAST}
