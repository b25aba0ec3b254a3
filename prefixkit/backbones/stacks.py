"""The attentions of an encoder-decoder: what each of them receives, and what it sees of a text.

A prefix stands before the keys and values of the text that is looked at: of the source in the encoder's self-attention,
of the target in the decoder's, and of the encoder's output in the cross-attention between them. It takes no positions:
BART counts the text from 0 as if there were no prefix, and T5's bias by distance leaves the slots out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.backbones.attention import KEYWORD, Injected, route
from prefixkit.backbones.geometry import evaluating, one_token
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.format.names import ATTENTIONS

Place = tuple[str, str]
"""Stack and attention, one of `prefixkit.format.names.ATTENTIONS`."""
Heard = dict[int, tuple[Tensor, Tensor]]
"""By layer, the keys and values [batch, kv_heads, seq, head_dim] of a text."""


class Stacks:
    """Hooks on the encoder and the decoder of a model. They hand each attention what it receives.

    Raises:
        BackboneError: the model's attention implementation cannot be given a prefix.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.previous = model, route(model)
        self._received: Mapping[Place, Injected] = {}
        stacks = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
        self._hooks = [
            stack.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            for name, stack in stacks.items()
        ]

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for hook in self._hooks:
            hook.remove()
        self.model.set_attn_implementation(self.previous)

    @contextmanager
    def receiving(self, received: Mapping[Place, Injected]) -> Iterator[PreTrainedModel]:
        """The model with `received` in it for the length of a `with` block."""
        self._received = received
        try:
            yield self.model
        finally:
            self._received = {}

    @torch.no_grad()
    def hear(self, source: Tensor, target: Tensor) -> dict[Place, Heard]:
        """The keys and values that each attention sees when `source` is read and `target` [batch, seq] written."""
        heard: dict[Place, Heard] = {place: {} for place in ATTENTIONS}
        with self.receiving({place: Injected(heard=layers) for place, layers in heard.items()}) as model:
            model(input_ids=source, decoder_input_ids=target, use_cache=False)
        return heard

    def _before(self, stack: str, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
        injected = self._received.get((stack, "self"), Injected())
        if stack == "decoder":
            injected = replace(injected, cross=self._received.get((stack, "cross"), Injected()))
        return arguments, {**keywords, KEYWORD: injected}


def measure_stacks(model: PreTrainedModel, where: str) -> dict[str, tuple[LayerGeometry, ...]]:
    """The geometry of `encoder` and `decoder`, from two tokens read and one written.

    Raises:
        BackboneError: attention that what is injected does not reach, layers whose keys and values are not one a token
            and head, or cross-attention of another shape than the decoder's self-attention, which no file could state.
    """
    stacks, token = Stacks(model), one_token(model)
    try:
        with evaluating(model):
            heard = stacks.hear(token.expand(1, 2), token)
    finally:
        stacks.remove()
    _refuse_unreached(model, heard, where)
    tokens = {("decoder", "self"): 1}
    measured = {place: _geometry(layers, tokens.get(place, 2), where) for place, layers in heard.items()}
    own, cross = measured["decoder", "self"], measured["decoder", "cross"]
    if own != cross:
        expected, found = "cross-attention of the shape of the decoder's self-attention", "another"
        raise BackboneError(where, expected=expected, found=f"{model.config.model_type}: {found}")
    return {"encoder": measured["encoder", "self"], "decoder": own}


def _refuse_unreached(model: PreTrainedModel, heard: Mapping[Place, Heard], where: str) -> None:
    # What has a direction to look in is attention: each such module must have been reached, as what it is.
    modules = sum(hasattr(module, "is_causal") for module in model.modules())
    reached = sum(map(len, heard.values()))
    if modules != reached or any(sorted(layers) != list(range(len(layers))) for layers in heard.values()):
        found = f"{model.config.model_type}: {reached}"
        raise BackboneError(where, expected=f"a prefix to reach all {modules} attention modules", found=found)


def _geometry(layers: Heard, tokens: int, where: str) -> tuple[LayerGeometry, ...]:
    for key, value in layers.values():
        if key.ndim != 4 or key.shape[2] != tokens or value.shape[:3] != key.shape[:3]:
            expected = f"keys and values [1, kv_heads, {tokens}, head_dim] in each layer"
            raise BackboneError(where, expected=expected, found=f"{tuple(key.shape)} and {tuple(value.shape)}")
    pairs = (layers[layer] for layer in sorted(layers))
    return tuple(
        LayerGeometry(kv_heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3]) for key, value in pairs
    )
