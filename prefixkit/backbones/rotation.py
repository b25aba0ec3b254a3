"""How a decoder turns its keys with their positions, measured on the model rather than guessed from its configuration.

The frequencies are those that the model itself uses, with every scaling. Which layers turn, and which dimensions go
together, shows in the keys of one token at several positions: alone it sees itself and nothing else, so that in every
layer its keys differ by the turn and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from prefixkit.algebra import Rotation
from prefixkit.backbones.decoder import Decoder
from prefixkit.errors import BackboneError
from prefixkit.prefix import Array

_PROBES = (1, 11)
"""Positions of the one token, beside 0."""
_TOLERANCE = 1e-4
"""Of the largest number of a key; other rotations are off by 0.1 and more."""
_BY_LENGTH = ("dynamic", "longrope")
"""Scalings that turn by other angles in longer texts."""


def rotations(decoder: Decoder) -> tuple[Rotation, ...]:
    """The rotation of each layer; one without frequencies where the keys of a layer do not turn.

    Args:
        decoder: computing in float32.

    Raises:
        BackboneError: keys that change with their position otherwise (learned positions, scaling by text length).
    """
    _refuse_scaling_by_length(decoder)
    first, *others = ([key.numpy() for key in _keys_at(decoder, position)] for position in (0, *_PROBES))
    candidates = list(_candidates(decoder))
    found = []
    for layer, key in enumerate(first):
        pairs = [(position, keys[layer]) for position, keys in zip(_PROBES, others, strict=True)]
        fitting = (one for one in candidates if all(_close(one.moved(key, 0, by), there) for by, there in pairs))
        found.append(_first(fitting, decoder, layer))
    return tuple(found)


def _first(fitting: Iterator[Rotation], decoder: Decoder, layer: int) -> Rotation:
    rotation = next(fitting, None)
    if rotation is None:
        raise BackboneError(
            decoder.identity.name,
            expected="keys that turn with their position, or that do not change with it",
            found=f"others in layer {layer}",
            next_step="keys and values cannot be moved there; train or capture them in one piece",
        )
    return rotation


def _candidates(decoder: Decoder) -> Iterator[Rotation]:
    """No rotation first: it is what a layer without frequencies of its own has."""
    yield Rotation(np.zeros(0, np.float32))
    for frequencies in _frequencies(decoder.model):
        for interleaved in (False, True):
            yield Rotation(frequencies, interleaved)


def _frequencies(model: nn.Module) -> Iterator[Array]:
    """The frequencies that `transformers` keeps in buffers: one set, or one for each type of layer."""
    seen: set[bytes] = set()
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            array = buffer.float().cpu().numpy()
            if array.tobytes() not in seen:
                seen.add(array.tobytes())
                yield array


@torch.no_grad()
def _keys_at(decoder: Decoder, position: int) -> list[torch.Tensor]:
    """The keys [kv_heads, 1, key_dim] of a token that stands alone at `position`, by layer."""
    cache = DynamicCache()
    token = torch.ones(1, 1, dtype=torch.long, device=decoder.device)
    places = torch.full_like(token, position)
    with decoder.injected(None, token) as model:
        mask = torch.ones_like(token)
        model(input_ids=token, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    return [layer.keys[0].float().cpu() for layer in cache.layers]


def _close(ours: Array, theirs: Array) -> bool:
    return bool(np.abs(ours - theirs).max() <= _TOLERANCE * np.abs(theirs).max())


def _refuse_scaling_by_length(decoder: Decoder) -> None:
    rope = decoder.identity.rope or {}
    kinds = [rope.get("rope_type"), *(one.get("rope_type") for one in rope.values() if isinstance(one, dict))]
    found = [kind for kind in kinds if kind in _BY_LENGTH]
    if found:
        expected = "rotary positions whose angles do not depend on the length of the text"
        raise BackboneError(decoder.identity.name, expected=expected, found=f"{found[0]} scaling")
