"""Deltas in the weights of a graph: the parameters are sums while it is traced and saved, and are restored then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from prefixkit.backbones.deltas import named_parameters
from prefixkit.injections import Injection, ParameterDelta, part_of


@contextmanager
def written_into(model: PreTrainedModel, received: Injection | None) -> Iterator[None]:
    """`model` with the deltas of `received` in its parameters, whose shapes were checked before.

    Unlike `prefixkit.backbones.deltas.changed`, which hides parameters from whoever looks for them by name.
    """
    delta = part_of(received, ParameterDelta)
    known = named_parameters(model)
    kept = {name: known[name].data for name in (delta.deltas if delta is not None else ())}
    try:
        for name, stored in kept.items():
            assert delta is not None
            known[name].data = stored + delta.deltas[name].to(stored)
        yield
    finally:
        for name, stored in kept.items():
            known[name].data = stored
