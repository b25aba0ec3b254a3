"""A prompt's vectors in the slots that a task's template marks among the tokens of a text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.errors import MismatchError
from prefixkit.injections import EmbeddingPrompt, Injection, part_of
from prefixkit.task import SLOT_ID


def in_slots(received: Injection | None) -> EmbeddingPrompt | None:
    """The prompt of `received` that stands in slots; None where there is none."""
    prompt = part_of(received, EmbeddingPrompt)
    return prompt if prompt is not None and prompt.placement == "slots" else None


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
    slots = ids == SLOT_ID
    counts = slots.sum(dim=1)
    if (counts != prompt.length).any():
        expected, found = f"{prompt.length} slots in every text", f"{int(counts.min())} to {int(counts.max())}"
        step = "use the task that the prompt was trained for"
        raise MismatchError(model.config.model_type, expected=expected, found=found, next_step=step)
    rows = prompt.embeddings.to(vectors).repeat(len(ids), 1)
    return torch.index_put(vectors, slots.nonzero(as_tuple=True), rows)
