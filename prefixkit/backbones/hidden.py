"""Hidden prompts: rows of their own in every layer as keys and values, or something added to the rows that are there.

Rows that begin anew in every layer are constants there, so all that the text can see of them is their keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.backbones.attention import KEYWORD, Injected, Seen
from prefixkit.backbones.geometry import reader_of
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import HiddenPrompt, KeyValuePrefix


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of `model`, in order.

    Raises:
        BackboneError: not one list of them.
    """
    count = model.config.num_hidden_layers
    lists = [module for module in reader_of(model).modules() if isinstance(module, nn.ModuleList)]
    for layers in lists:
        if len(layers) == count and any(hasattr(module, "is_causal") for module in layers.modules()):
            return layers
    raise BackboneError(model.config.model_type, expected=f"a list of {count} layers", found=f"{len(lists)} others")


def fold_hidden(model: PreTrainedModel, prompt: HiddenPrompt) -> KeyValuePrefix:
    """The keys and values that every layer makes of its own prompt rows, with gradients; the model is routed.

    Raises:
        MismatchError: another number of layers, or another width.
        BackboneError: rows in slots of the text, which are no rows of their own, or layers that rotate by position.
    """
    refuse_other_shape(model, prompt)
    _refuse_rotating(model)
    if prompt.placement == "slots":
        raise BackboneError(model.config.model_type, expected="hidden prompts before the text", found="slots in it")
    seen: list[Seen] = []
    for layer, rows in zip(layers_of(model), prompt.hidden, strict=True):
        layer(rows.to(model.device, model.dtype)[None], None, **{KEYWORD: Injected(seen=seen)})
    return KeyValuePrefix(
        keys=tuple(layer.key[0] for layer in seen),
        values=tuple(layer.value[0] for layer in seen),
        positions=prompt.positions,
        stack=prompt.stack,
    )


def _refuse_rotating(model: PreTrainedModel) -> None:
    # ModernBERT's: rows without a position have no keys there.
    if "position_embeddings" in signature(layers_of(model)[0].forward).parameters:
        expected, found = "layers that read states alone, for a hidden prompt", "layers that rotate keys by position"
        raise BackboneError(model.config.model_type, expected=expected, found=found)


@contextmanager
def added(model: PreTrainedModel, prompt: HiddenPrompt | None, chosen: Tensor | None) -> Iterator[None]:
    """`model` with `prompt` added to the inputs of its layers.

    Args:
        chosen: [batch, seq], True at as many places of each row as the prompt has, in order; None without a prompt.
    """
    hooks = []
    if prompt is not None:
        assert chosen is not None
        refuse_other_shape(model, prompt)
        for layer, rows in zip(layers_of(model), prompt.hidden, strict=True):
            hooks.append(layer.register_forward_pre_hook(_adding(rows, chosen)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(rows: Tensor, chosen: Tensor) -> Any:
    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = arguments
        moved = states.new_zeros(states.shape)
        moved[chosen] = rows.to(states).repeat(len(states), 1)
        return (states + moved, *others)

    return before


def refuse_other_shape(model: PreTrainedModel, prompt: HiddenPrompt) -> None:
    """Raise MismatchError for a prompt of another depth or width than the model's."""
    found = [tuple(rows.shape) for rows in prompt.hidden]
    wanted = [(prompt.length, model.config.hidden_size)] * model.config.num_hidden_layers
    if found != wanted:
        expected = f"{len(wanted)} layers of vectors of width {wanted[0][1]}"
        told = f"{len(found)} of width {found[0][1] if found else 0}"
        raise MismatchError(model.config.model_type, expected=expected, found=told)
