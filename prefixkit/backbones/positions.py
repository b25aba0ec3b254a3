"""Where each token of a batch stands, counted in real tokens, whatever padding and cache surround it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from prefixkit.backbones.geometry import reader_of
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import Positions


def query_index(tokens: Tensor, keywords: dict[str, Any]) -> Tensor:
    """[batch, seq]: how many real tokens of its row precede each query token; -1 or repeated on padding."""
    given: Tensor | None = keywords.get("position_ids")
    if given is not None:
        return given
    batch, seq = tokens.shape[:2]
    mask = keywords.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1)[:, -seq:]
    cache = keywords.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(seq, device=tokens.device) + past).expand(batch, -1)


def has_alibi(config: PreTrainedConfig) -> bool:
    """Whether attention is biased by distance (Press et al. 2022, arXiv 2108.12409), with no positions of its own."""
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether position ids place the text; a model with ALiBi counts tokens itself, whatever its signature says."""
    return "position_ids" in inspect.signature(reader_of(model).forward).parameters and not has_alibi(model.config)


def first_position(model: PreTrainedModel) -> int:
    """The position id of a first token; RoBERTa and its kin leave the ids up to their padding token's to padding."""
    embeddings = getattr(reader_of(model), "embeddings", None)
    counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(model.config.pad_token_id) + 1 if counts_from_padding else 0


def refuse_unplaceable(model: PreTrainedModel, positions: Positions, length: int) -> None:
    """Refuse text positions that `model` cannot give to the text behind a prefix of `length` slots.

    Raises:
        BackboneError: the model counts tokens itself, so that its text starts at `length` and nowhere else.
    """
    if takes_positions(model):
        return
    if not has_alibi(model.config):
        if positions.text_start:
            raise BackboneError(
                model.config.model_type,
                expected="an input that starts at position 0 (it takes no position ids)",
                found=f"one that starts at {positions.text_start}",
                next_step="use positions none",
            )
    elif positions.text_start != length:
        raise BackboneError(
            model.config.model_type,
            expected=f"text that starts at {length}, behind the prefix (it takes no position ids)",
            found=f"text that starts at {positions.text_start}",
            next_step="use a prefix trained with --set method.positions=offset",
        )
