"""Parameters with something added to them, for the length of a forward pass; the parameters themselves stay frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.errors import MismatchError
from prefixkit.injections import ParameterDelta, Received, part_of


def named_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of `model` under the names that a prefix file gives them: without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    own = ((name, weight) for name, weight in model.named_parameters() if not name.startswith("prefixkit."))
    return {name.removeprefix(prefix): weight for name, weight in own}


def biases(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every bias of `model`."""
    known = named_parameters(model)
    return {name: weight for name, weight in known.items() if name.rpartition(".")[2] == "bias"}


def normalizations(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The scales and biases of every normalisation of `model`, of whatever class."""
    inside = {
        id(weight)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for weight in module.parameters(recurse=False)
    }
    return {name: weight for name, weight in named_parameters(model).items() if id(weight) in inside}


@contextmanager
def changed(model: PreTrainedModel, received: Received | None) -> Iterator[None]:
    """`model` with the deltas of `received` added to its parameters, with gradients into them.

    Raises:
        MismatchError: a delta for a parameter that the model has not, or of another shape.
    """
    delta = part_of(received, ParameterDelta)
    with standing_again(_places(model, _sums(model, delta.deltas) if delta is not None else {})):
        yield


def _sums(model: PreTrainedModel, deltas: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """By the identity of a parameter, what stands in its place; tied parameters change together."""
    known, sums = named_parameters(model), {}
    step = "use the backbone that the deltas were trained on"
    for name, delta in deltas.items():
        weight = known.get(name)
        if weight is None or weight.shape != delta.shape:
            expected = f"a parameter {name} {list(delta.shape)}"
            found = "none" if weight is None else f"{list(weight.shape)}"
            raise MismatchError(model.config.model_type, expected=expected, found=found, next_step=step)
        sums[id(weight)] = weight + delta.to(weight.device, weight.dtype)
    return sums


Standing = tuple[nn.Module, str, Tensor]
"""A module, the name of one of its parameters, and what stands in its place."""


def standing(model: nn.Module) -> list[Standing]:
    """What stands in the place of parameters of `model` now."""
    return [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in module._parameters
        if name in module.__dict__
    ]


@contextmanager
def standing_again(places: Sequence[Standing]) -> Iterator[None]:
    """Tensors in the place of parameters, for the length of a `with` block."""
    # A plain attribute hides the parameter of its name; `state_dict` and optimizers never see it.
    hidden: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for module, name, tensor in places:
            hidden.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = tensor
        yield
    finally:
        for module, name, before in hidden:
            del module.__dict__[name]
            if before is not None:
                module.__dict__[name] = before


def _places(model: PreTrainedModel, tensors: Mapping[int, Tensor]) -> list[Standing]:
    """Where the parameters are that have one of `tensors` by their identity."""
    return [
        (module, name, tensors[id(weight)])
        for module in (model.modules() if tensors else ())
        for name, weight in module._parameters.items()
        if id(weight) in tensors
    ]
