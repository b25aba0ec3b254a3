"""What a forward pass keeps for the backward pass, in bytes, counted where it happens: no formula for any architecture.

With frozen weights that is nearly all of a step's memory beside the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.recomputation import keeping, layers_to_recompute


@dataclass(frozen=True)
class Kept:
    """Bytes between a forward pass and its backward pass, weights not counted.

    Attributes:
        plainly: with everything that the layers leave.
        recomputed: with nothing of the layers but their inputs; as much as `plainly` where they cannot be recomputed.
        layer: what one layer leaves.
    """

    plainly: int
    recomputed: int
    layer: int


def kept(model: PreTrainedModel, forward: Callable[[], Tensor]) -> Kept:
    """What `forward` through `model` keeps, for as long as the tensor lives that it gives."""
    layers = layers_to_recompute(model)
    frozen = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
    counted = _Counted()
    with keeping(), counted.inside(layers), torch.autograd.graph.saved_tensors_hooks(counted.pack, _unpack):
        alive = forward()
    within, around = counted.sizes(frozen)
    del alive
    own = {place: size for place, size in within.items() if place not in around}
    inputs = {place: size for place, size in counted.inputs.items() if place not in around}
    plainly = sum(around.values()) + sum(own.values())
    recomputed = sum(around.values()) + sum(inputs.values()) if layers and own else plainly
    return Kept(plainly=plainly, recomputed=recomputed, layer=sum(own.values()) // max(1, len(layers)))


class _Entry:
    """A saved tensor, which is forgotten with its graph."""

    def __init__(self, tensor: Tensor, inside: bool) -> None:
        self.tensor, self.inside = tensor, inside


class _Counted:
    """Saved tensors that are still there, and the inputs of layers."""

    def __init__(self) -> None:
        self.entries: WeakSet[_Entry] = WeakSet()
        self.inputs: dict[int, int] = {}
        self._held: list[Tensor] = []
        self._depth = 0

    def pack(self, tensor: Tensor) -> _Entry:
        """What autograd is to keep in the place of `tensor`."""
        # Detached: a tensor that its own graph keeps, through Python, would never be given back.
        entry = _Entry(tensor.detach(), self._depth > 0)
        self.entries.add(entry)
        return entry

    @contextmanager
    def inside(self, layers: list[torch.nn.Module]) -> Iterator[None]:
        """Know which tensors are saved in one of `layers`, in a `with` block."""
        hooks: list[Any] = []
        for layer in layers:
            hooks += [layer.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)]
            hooks += [layer.register_forward_hook(self._leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sizes(self, frozen: set[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes by place of what was saved in the layers, and of what was saved around them."""
        within: dict[int, int] = {}
        around: dict[int, int] = {}
        for entry in self.entries:
            place = _place(entry.tensor)
            if place not in frozen:
                (within if entry.inside else around)[place] = entry.tensor.untyped_storage().nbytes()
        return within, around

    def _enter(self, _: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._depth += 1
        given = arguments[0] if arguments else keywords.get("hidden_states")
        if isinstance(given, Tensor) and torch.is_grad_enabled():
            self._held.append(given.detach())  # so that no other tensor gets its place
            self.inputs[_place(given)] = given.untyped_storage().nbytes()

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unpack(entry: _Entry) -> Tensor:
    return entry.tensor
