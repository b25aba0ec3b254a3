"""The stacks of a frozen model, compiled in place by torch.compile (Ansel et al. 2024, ASPLOS): one graph a stack.

What is compiled is a stack's own forward pass, behind the hooks that place a prefix, so that the prefix comes in as
tensors. Only passes with gradients are compiled: validation is seldom, and would have to be compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._dynamo import config
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel

from prefixkit.backbones import own_forward
from prefixkit.backbones.geometry import reader_of
from prefixkit.backbones.weights import is_pair

_RECOMPILATIONS = 64
"""Beyond dynamo's limit a pass runs uncompiled and says nothing."""


def stacks(model: PreTrainedModel) -> Sequence[nn.Module]:
    """What is compiled: the decoder, the encoder, or both."""
    return (model.get_encoder(), model.get_decoder()) if is_pair(model.config) else (reader_of(model),)


def compile_stacks(model: PreTrainedModel, *, backend: str = "inductor", mode: str | None = None) -> None:
    """Let passes with gradients run compiled from here on; the first of them compiles. `restore_stacks` undoes it.

    A stack that is compiled already stays so: runs of one backbone, one after the other, compile once.

    Args:
        mode: of torch.compile; `reduce-overhead` records CUDA graphs, one for each length of rows.
    """
    config.recompile_limit = max(config.recompile_limit, _RECOMPILATIONS)
    config.specialize_float = True  # scales and caps are the model's: FlexAttention takes none that vary
    for stack in stacks(model):
        if not own_forward.has_one(stack):
            own_forward.give(stack, _with_gradients(stack.forward, backend, mode))


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether `compile_stacks` was called for `model`."""
    return any(map(own_forward.has_one, stacks(model)))


def restore_stacks(model: PreTrainedModel) -> None:
    """Let all passes of `model` run uncompiled again."""
    for stack in stacks(model):
        own_forward.take_away(stack)


def _with_gradients(forward: Callable[..., Any], backend: str, mode: str | None) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True, backend=backend, mode=mode)

    @wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        # A prefix as long as the batch is wide is a coincidence, and no rule of the graph.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*arguments, **keywords)

    return run
