"""The cache route, for models outside the attention registry: the prefix is the beginning of the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from prefixkit.backbones.positions import query_index, takes_positions
from prefixkit.errors import BackboneError
from prefixkit.injections import KeyValuePrefix


def through_cache(model: PreTrainedModel, prefix: KeyValuePrefix, tokens: Tensor, keywords: dict[str, Any]) -> None:
    """Put `prefix` at the beginning of the cache in a decoder's `keywords`, and let the mask cover it.

    Raises:
        BackboneError: gradient checkpointing, a static cache or a ready-made mask, none of which leaves it room.
    """
    cache, mask = keywords.get("past_key_values"), keywords.get("attention_mask")
    _refuse_for_cache(model, cache, mask)
    batch, seq = tokens.shape[:2]
    cache = DynamicCache() if cache is None else cache
    past = cache.get_seq_length()
    if past == 0:
        fill(cache, prefix, tokens, model.dtype)
        past = prefix.length
    if mask is None:
        mask = torch.ones(batch, past - prefix.length + seq, dtype=torch.long, device=tokens.device)
    ones = torch.ones(batch, prefix.length, dtype=mask.dtype, device=mask.device)
    if takes_positions(model):
        index = query_index(tokens, {**keywords, "attention_mask": mask}).clamp(min=0)
        keywords["position_ids"] = index + prefix.positions.text_start
    keywords.update(past_key_values=cache, attention_mask=torch.cat([ones, mask], dim=-1))


def _refuse_for_cache(model: PreTrainedModel, cache: Any, mask: Any) -> None:
    """Refuse what a prefix in the cache cannot serve."""
    found = ""
    if checkpoints(model):
        found = "gradient checkpointing, which drops the cache"
    elif isinstance(cache, StaticCache):
        found = "a static cache, which has no room for it"
    elif isinstance(mask, Tensor) and mask.ndim != 2:
        found = f"an attention mask of {mask.ndim} dimensions"
    if found:
        raise BackboneError(
            model.config.model_type,
            expected="a dynamic cache and a mask [batch, seq] (its architecture takes a prefix only through the cache)",
            found=found,
            next_step="do without it, or use an architecture of the attention registry, such as Llama or GPT-2",
        )


def forget_cache(module: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
    """Without caching nobody asked for the cache that carried the prefix; `generate` would go on with it."""
    wanted = keywords.get("use_cache")
    wanted = module.config.use_cache if wanted is None else wanted  # type: ignore[union-attr]
    if not wanted and "past_key_values" in output:
        output.past_key_values = None


def fill(cache: DynamicCache, prefix: KeyValuePrefix, tokens: Tensor, dtype: torch.dtype) -> None:
    """Put `prefix` into an empty cache, before each row of `tokens` [batch, seq]."""
    for layer, pair in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        key, value = (part.to(tokens.device, dtype).expand(tokens.shape[0], -1, -1, -1) for part in pair)
        cache.update(key, value, layer)


def checkpoints(model: PreTrainedModel) -> bool:
    """Whether a training step of `model` would run its layers again in the backward pass."""
    # By its modules: the model's own property has another name in every other version of transformers.
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
