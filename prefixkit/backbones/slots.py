"""A prompt's vectors, or keys and values, in the slots that a task's template marks among the tokens of a text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.attention import uses_registry
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import EmbeddingPrompt, KeyValuePrefix, Received, part_of
from prefixkit.task import SLOT_ID


def in_slots(received: Received | None) -> EmbeddingPrompt | None:
    """The prompt of `received` that stands in slots; None where there is none."""
    prompt = part_of(received, EmbeddingPrompt)
    return prompt if prompt is not None and prompt.placement == "slots" else None


def infix_of(received: Received | None) -> KeyValuePrefix | None:
    """The keys and values of `received` that stand in slots; None where there are none."""
    prefix = part_of(received, KeyValuePrefix)
    return prefix if prefix is not None and prefix.placement == "slots" else None


def refuse_infix(model: PreTrainedModel) -> None:
    """Raise BackboneError for a model whose attention does not hand over the keys and values of its slots."""
    if not uses_registry(model):
        raise BackboneError(
            model.config.model_type,
            expected="an architecture of the attention registry for keys and values in slots of the text",
            found="one that takes a prefix only through its cache, before the text",
            next_step="use a task without slots, or --method prompt-tuning",
        )


def token_vectors(model: PreTrainedModel, ids: Tensor, width: int) -> Tensor:
    """[batch, seq, hidden]: the vector of every token; a slot's is that of any.

    Raises:
        MismatchError: a prompt of another `width` than the model's vectors.
    """
    vectors: Tensor = model.get_input_embeddings()(ids.clamp(min=0))
    if vectors.shape[2] != width:
        expected, step = (
            f"prompt vectors of width {vectors.shape[2]}",
            "use the backbone that the prompt was trained on",
        )
        raise MismatchError(model.config.model_type, expected=expected, found=str(width), next_step=step)
    return vectors


def filled(model: PreTrainedModel, ids: Tensor, prompt: EmbeddingPrompt) -> Tensor:
    """[batch, seq, hidden]: the vectors of the tokens `ids` [batch, seq], and vector i of the prompt in slot i.

    Raises:
        MismatchError: another number of slots in a row than the prompt has vectors, or another width.
    """
    vectors = token_vectors(model, ids, prompt.embeddings.shape[1])
    slots = numbered(model, ids, prompt.length) >= 0
    rows = prompt.embeddings.to(vectors).repeat(len(ids), 1)
    return torch.index_put(vectors, slots.nonzero(as_tuple=True), rows)


def numbered(model: PreTrainedModel, ids: Tensor, length: int) -> Tensor:
    """[batch, seq]: which slot of its row stands at each of `ids` [batch, seq], from 0; -1 at tokens.

    Raises:
        MismatchError: another number of slots in a row than `length`.
    """
    slots = ids == SLOT_ID
    counts = slots.sum(dim=1)
    if (counts != length).any():
        expected, found = f"{length} slots in every text", f"{int(counts.min())} to {int(counts.max())}"
        step = "use the task that the prompt was trained for"
        raise MismatchError(model.config.model_type, expected=expected, found=found, next_step=step)
    return torch.where(slots, slots.cumsum(dim=1) - 1, -1)
