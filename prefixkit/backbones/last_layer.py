"""Behind a model's last attention no token looks at another: what follows is needed only where logits are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.backbones import own_forward
from prefixkit.backbones.cache_route import checkpoints
from prefixkit.backbones.compiled import is_compiled
from prefixkit.backbones.onednn import divides
from prefixkit.backbones.recomputation import is_recomputed, layers_to_recompute


@contextmanager
def last_mlp_at(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """The last layer's MLP, in a `with` block, works where `chosen` [batch, seq] is True, and gives zeros elsewhere.

    A layer that is compiled, or computed again when the block is over, works everywhere, as does one without an `mlp`,
    and one that would multiply few rows otherwise than all of them.
    """
    mlp = _last_mlp(model)
    if mlp is None or divides(mlp, chosen):
        yield
        return
    own_forward.give(mlp, _at(chosen, mlp.forward))
    try:
        yield
    finally:
        own_forward.take_away(mlp)


def _at(chosen: Tensor, everywhere: Callable[..., Any]) -> Callable[..., Any]:
    def forward(states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        # Another shape is a look at the model on the way; another argument is as long as the row (Bloom's residual).
        if states.shape[:2] != chosen.shape or arguments or keywords:
            return everywhere(states, *arguments, **keywords)
        found = everywhere(states[chosen][None])
        made = found if isinstance(found, Tensor) else found[0]
        spread = made.new_zeros(*chosen.shape, made.shape[-1]).index_put((chosen,), made[0])
        return spread if isinstance(found, Tensor) else (spread, *found[1:])

    return forward


def _last_mlp(model: PreTrainedModel) -> nn.Module | None:
    layers = layers_to_recompute(model)
    if not layers or is_compiled(model) or is_recomputed(layers[-1]) or checkpoints(model):
        return None
    mlp = getattr(layers[-1], "mlp", None)
    return mlp if isinstance(mlp, nn.Module) and not own_forward.has_one(mlp) else None
