"""Encoders that are given a prefix: what their attention looks like, and the keys and values of a real input."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.attention import Seen, look, uses_registry
from prefixkit.backbones.geometry import one_input
from prefixkit.backbones.weights import in_a_line
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry, Positions
from prefixkit.injections import KeyValuePrefix


def measure_encoder(model: PreTrainedModel) -> tuple[LayerGeometry, ...]:
    """The shape of every layer's keys and values, read off the layers at work.

    Raises:
        BackboneError: attention outside the registry of `transformers`, or a model that wants more than one input.
    """
    _refuse_outside(model)
    try:
        seen = _seen(model, one_input(model))
    except BackboneError:
        raise
    except Exception as error:  # X-MOD wants a language first, others want boxes: each raises its own types
        expected = "an encoder that reads a text, or an image, and nothing else"
        raise BackboneError(model.config.model_type, expected=expected, found=in_a_line(error)) from error
    return tuple(layer.geometry for layer in seen)


def key_values_in(model: PreTrainedModel, inputs: Mapping[str, Tensor], *, offset: bool = True) -> KeyValuePrefix:
    """The keys and values that every layer of an encoder without a prefix computes of one input.

    As a prefix they are a start, no equal of the input: an input before the text would look at the text as well.

    Args:
        inputs: `input_ids` [1, seq], or `pixel_values` [1, channels, height, width].
        offset: the text behind starts at position `seq`; else it starts at 0.

    Raises:
        BackboneError: attention outside the registry of `transformers`.
    """
    seen = _seen(model, inputs)
    length = seen[0].key.shape[2]
    return KeyValuePrefix(
        keys=tuple(layer.key[0].detach().clone() for layer in seen),
        values=tuple(layer.value[0].detach().clone() for layer in seen),
        positions=Positions(text_start=length if offset else 0, prefix_takes_positions=offset),
        stack="encoder",
    )


def _seen(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Seen]:
    _refuse_outside(model)
    seen, layers = look(model, inputs), model.config.num_hidden_layers
    reached = len({id(layer.module) for layer in seen})
    if not len(seen) == reached == layers:
        expected = f"a prefix to reach the attention of all {layers} layers"
        raise BackboneError(model.config.model_type, expected=expected, found=f"{reached}")
    return seen


def _refuse_outside(model: PreTrainedModel) -> None:
    if not uses_registry(model):
        raise BackboneError(
            model.config.model_type,
            expected="an encoder that computes attention through the registry of transformers",
            found="one that computes it itself",
            next_step="use an encoder such as BERT, RoBERTa or ViT",
        )
