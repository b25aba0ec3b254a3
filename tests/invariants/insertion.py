"""The oracle of prompts: rows written into the states of a model of `transformers`, layer by layer, with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def layers_by_name(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model without a head, found by what `transformers` calls them."""
    for path in ("encoder.layer", "transformer.layer", "layers", "encoder.layers"):
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return list(found)
    raise LookupError(type(model).__name__)


@contextmanager
def inserted(model: PreTrainedModel, rows: Tensor, begin: int) -> Iterator[PreTrainedModel]:
    """`rows` [prefix, hidden] in front of place `begin` of what the first layer reads, once positions are added."""

    def before_the_layers(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        shared = rows.to(output).repeat(len(output), 1, 1)
        return torch.cat([output[:, :begin], shared, output[:, begin:]], dim=1)

    # ELECTRA's small models embed in another width than they think in.
    last = getattr(model, "embeddings_project", model.embeddings)
    with _hooked([last.register_forward_hook(before_the_layers)]):
        yield model


@contextmanager
def replaced(model: PreTrainedModel, rows: Sequence[Tensor], begin: int) -> Iterator[PreTrainedModel]:
    """The places from `begin` on hold `rows[i]` when layer i reads them."""

    def overwriting(states: Tensor, own: Tensor) -> Tensor:
        shared = own.to(states).repeat(len(states), 1, 1)
        return torch.cat([states[:, :begin], shared, states[:, begin + len(own) :]], dim=1)

    with _before_each_layer(model, rows, overwriting):
        yield model


@contextmanager
def raised(model: PreTrainedModel, rows: Sequence[Tensor], places: Sequence[int]) -> Iterator[PreTrainedModel]:
    """The states at `places` of every row of a batch have `rows[i]` added when layer i reads them."""

    def adding(states: Tensor, own: Tensor) -> Tensor:
        higher = states.clone()
        for place, row in zip(places, own.to(states), strict=True):
            higher[:, place] += row
        return higher

    with _before_each_layer(model, rows, adding):
        yield model


@contextmanager
def _before_each_layer(
    model: PreTrainedModel, rows: Sequence[Tensor], change: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    def hook(own: Tensor) -> Any:
        return lambda _, arguments: (change(arguments[0], own), *arguments[1:])

    layers = layers_by_name(model)
    with _hooked([layer.register_forward_pre_hook(hook(own)) for layer, own in zip(layers, rows, strict=True)]):
        yield


@contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
