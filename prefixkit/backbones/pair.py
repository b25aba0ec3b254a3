"""What fits an encoder-decoder: where text starts behind prefixes, and which layers and shapes they must have."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from prefixkit.backbones.stacks import measure_stacks
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import Injection, KeyValuePrefix, KeyValuePrefixes

NO_POSITIONS = Positions(text_start=0, prefix_takes_positions=False)
"""Where text starts behind prefixes of an encoder-decoder: at 0, as if there were none."""


def refuse_positions(parts: Iterable[KeyValuePrefix], where: str) -> None:
    """Raise BackboneError for a prefix whose text would start elsewhere than at 0, or that stands in slots of it."""
    for part in parts:
        if part.placement != "prepend":
            raise BackboneError(where, expected="prefixes before the text", found=f"{part.place} in {part.placement}")
        if part.positions != NO_POSITIONS:
            found = f"{part.place} with text that starts at {part.positions.text_start}"
            step = "run one of PEFT's with prefixkit.bridges.transformers_cache"
            raise BackboneError(where, expected="prefixes that take no positions", found=found, next_step=step)


def fitting(model: PreTrainedModel, received: Injection) -> KeyValuePrefixes:
    """`received`, refused where `model`, an encoder-decoder without a prefix, cannot have it in its attention.

    Raises:
        BackboneError: no set of prefixes, or one whose text would start elsewhere than at 0.
        MismatchError: prefixes of other layers or shapes than the model's.
    """
    where = model.config.model_type
    if not isinstance(received, KeyValuePrefixes):
        expected, step = "prefixes for an encoder-decoder", "`prefixkit train` and `prefixkit eval` place prompts there"
        raise BackboneError(where, expected=expected, found=f"a {type(received).__name__}", next_step=step)
    refuse_positions(received.parts, where)
    refuse_shapes(received.parts, model)
    return received


def refuse_shapes(parts: Iterable[KeyValuePrefix], model: PreTrainedModel) -> None:
    """Raise MismatchError for prefixes of other layers or shapes than those of `model`, an encoder-decoder."""
    where = model.config.model_type
    stacks = measure_stacks(model, where)
    for part in parts:
        wanted = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in stacks[part.stack]]
        pairs = zip(part.keys, part.values, strict=True)
        found = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]
        if found != wanted:
            expected = f"{part.place} of layers with (kv_heads, key_dim, value_dim) {wanted}"
            step = "use the backbone that the prefixes were trained on"
            raise MismatchError(where, expected=expected, found=f"{found}", next_step=step)
