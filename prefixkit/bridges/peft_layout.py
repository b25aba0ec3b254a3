"""The one tensor of a PEFT folder, and the tensors of a prefix: which is which, bit for bit.

For encoder-decoders PEFT doubles the tensor, splits it by four and keeps the first two of each four (`get_prompt`, PEFT
0.21.2): of its `layers` L, layer i of the decoder gets what is stored for layer 2i mod L, and with an even L half of
what was trained has no effect at all. With an odd L every layer of the decoder finds one of its own.
"""

from __future__ import annotations

import numpy as np

from prefixkit.bridges.peft_folder import Adapter
from prefixkit.format import names
from prefixkit.prefix import Array


def tensors_of(adapter: Adapter, tensor: Array, layers: int) -> dict[str, Array]:
    """The tensors of a prefix file, by name.

    Args:
        tensor: in `adapter.shape`.
        layers: of the backbone's decoder.
    """
    if adapter.is_prompt:
        return {names.PROMPT: np.ascontiguousarray(tensor[: adapter.length])}
    tensors = {}
    stored = tensor.transpose(1, 2, 3, 0, 4)
    for layer, source in enumerate(_sources(adapter, layers)):
        tensors[names.key("decoder", "self", layer)] = np.ascontiguousarray(stored[source, 0])
        tensors[names.value("decoder", "self", layer)] = np.ascontiguousarray(stored[source, 1])
    return tensors


def left_behind(adapter: Adapter, layers: int) -> tuple[str, ...]:
    """What PEFT stores and never uses, in a sentence, if anything."""
    if adapter.is_prompt:
        if adapter.stacks == 1:
            return ()
        return (f"PEFT reads {adapter.length} of its {adapter.shape[0]} vectors; the others are left behind",)
    sources = _sources(adapter, layers)
    dead = sorted(set(range(adapter.layers)) - set(sources))
    if not dead:
        return ()
    told = f"PEFT stores keys and values for {adapter.layers} layers and never reads {_listed(dead)}: left behind"
    twice = "; it gives each of the others to two layers of the decoder" if len(set(sources)) < layers else ""
    return (told + twice,)


def _listed(layers: list[int]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))


def stored_layers(pair: bool, layers: int) -> int:
    """For how many layers PEFT is to store keys and values, so that each of a decoder's `layers` has its own."""
    return layers + 1 if pair and layers % 2 == 0 else layers


def packed(adapter: Adapter, pairs: list[tuple[Array, Array]]) -> Array:
    """PEFT's tensor in `adapter.shape` of the key and value [kv_heads, prefix, head_dim] of each layer."""
    tensor = np.zeros(adapter.shape, pairs[0][0].dtype)
    for source, (key, value) in zip(_sources(adapter, len(pairs)), pairs, strict=True):
        tensor[:, source, 0], tensor[:, source, 1] = key.swapaxes(0, 1), value.swapaxes(0, 1)
    return tensor


def _sources(adapter: Adapter, layers: int) -> list[int]:
    """For each layer of the decoder, the one of PEFT's that it gets."""
    return [2 * layer % adapter.layers if adapter.pair else layer for layer in range(layers)]
