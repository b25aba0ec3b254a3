"""What the graph of a model that reads takes and gives: by the model, and by what a file injects."""

from __future__ import annotations

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.injections import EmbeddingPrompt, HiddenPrompt, Injection, ParameterDelta, TaskHead, part_of
from prefixkit.serving.report import ReaderParts

ReadingBackbone = Encoder | Decoder


def plan_of(backbone: ReadingBackbone, folded: Injection | None) -> ReaderParts:
    """The parts of the graph of `backbone` for what it receives, folded."""
    prompt, hidden = part_of(folded, EmbeddingPrompt), part_of(folded, HiddenPrompt)
    head, delta = part_of(folded, TaskHead), part_of(folded, ParameterDelta)
    inputs = _read(backbone)
    inputs += ["prompt_embeddings"] if prompt is not None else []
    inputs += ["hidden_prompts"] if hidden is not None else []
    inputs += ["head.weight", "head.bias"] if head is not None else []
    return ReaderParts(
        inputs=tuple(inputs),
        logits=head is not None or (isinstance(backbone, Encoder) and backbone.writes),
        placement=None if prompt is None else prompt.placement,
        hidden_placement=None if hidden is None else hidden.placement,
        head=None if head is None else head.reads,
        deltas=() if delta is None else tuple(sorted(delta.deltas)),
    )


def _read(backbone: ReadingBackbone) -> list[str]:
    if backbone.kind == "vision":
        return ["pixel_values", "prefix_attention_mask"]
    typed = isinstance(backbone, Encoder) and getattr(backbone.model.config, "type_vocab_size", 0) > 1
    return [
        *("input_ids", "attention_mask"),
        *(["token_type_ids"] if typed else []),
        *(["position_ids"] if takes_positions(backbone.model) else []),
    ]
