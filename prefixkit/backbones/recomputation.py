"""Gradient checkpointing under a prefix: a layer keeps its inputs alone, and is computed again in the backward pass.

(Chen et al. 2016, arXiv 1604.06174.) `transformers` has it for models in train mode, with dropout; ours stay in eval
mode. What is injected is an argument of the layers, so they find it again when the pass that brought it is over. What
stands in the place of parameters, or in a cache, only while a pass lasts, is put back for as long as a layer works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixkit.backbones import own_forward
from prefixkit.backbones.attention import KEYWORD
from prefixkit.backbones.deltas import standing, standing_again
from prefixkit.errors import BackboneError


def recompute(model: PreTrainedModel) -> None:
    """Let every layer of `model` be computed again wherever a gradient goes back through it, until `keep` undoes it.

    Raises:
        BackboneError: an architecture whose layers are not known to give the same twice.
    """
    layers = layers_to_recompute(model)
    if not layers:
        found, step = f"{model.config.model_type}, which is made of none", "leave gradient checkpointing out"
        raise BackboneError("gradient_checkpointing", expected="layers to compute again", found=found, next_step=step)
    for index, layer in enumerate(layers):
        if not is_recomputed(layer):
            own_forward.give(layer, _twice(layer, index))


def keep(model: PreTrainedModel) -> None:
    """Undo `recompute`."""
    for layer in layers_to_recompute(model):
        own_forward.take_away(layer)


def is_recomputed(layer: nn.Module) -> bool:
    """Whether `layer` is computed again."""
    return own_forward.has_one(layer)


def layers_to_recompute(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of `model`, in the order of its stacks; none where we know of none."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def keeping() -> Iterator[None]:
    """Layers that keep everything after all, for the length of a `with` block."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


_KEEPING = ContextVar("keeping", default=False)


def _twice(layer: nn.Module, index: int) -> Callable[..., Any]:
    once = layer.forward

    def with_own_cache(*arguments: Any, **keywords: Any) -> Any:
        # What a layer adds to the cache must not be there when it is computed again.
        given = [_copied(value) for value in arguments]
        return once(*given, **{name: _copied(value) for name, value in keywords.items()})

    @wraps(once)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled() or _KEEPING.get() or _leaves_something(index, arguments, keywords):
            return once(*arguments, **keywords)
        deltas = standing(layer)
        return checkpoint(
            with_own_cache,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # in eval mode nothing is drawn
            context_fn=lambda: (nullcontext(), standing_again(deltas)),
            **keywords,
        )

    return forward


def _leaves_something(index: int, arguments: Any, keywords: dict[str, Any]) -> bool:
    """Whether a pass is there for what its layers leave: keys and values in an empty cache, or those that are seen."""
    injected = keywords.get(KEYWORD)
    caches = [value for value in (*arguments, *keywords.values()) if isinstance(value, Cache)]
    return (injected is not None and injected.seen is not None) or any(
        not cache.get_seq_length(index) for cache in caches
    )


def _copied(value: Any) -> Any:
    if not isinstance(value, Cache):
        return value
    copied = copy(value)
    copied.layers = [copy(layer) for layer in value.layers]
    return copied
