"""The attentions of an encoder-decoder: what each of them receives, and what it sees of a text.

A prefix stands before the keys and values of the text that is looked at: of the source in the encoder's self-attention,
of the target in the decoder's, and of the encoder's output in the cross-attention between them. It takes no positions:
BART counts the text from 0 as if there were no prefix, and T5's bias by distance leaves the slots out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.backbones.attention import ATTACHMENT, KEYWORD, Injected, Seen, number, route, uninstall
from prefixkit.backbones.geometry import evaluating, one_token
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefixes

Place = tuple[str, str]
"""Stack and attention, one of `prefixkit.format.names.ATTENTIONS`."""


def placed(prefixes: KeyValuePrefixes | None) -> dict[Place, Injected]:
    """`prefixes` by the place that receives them; nothing for None."""
    parts = () if prefixes is None else prefixes.parts
    return {(part.stack, part.attention): Injected(keys=part.keys, values=part.values) for part in parts}


class Stacks:
    """Hooks on the encoder and the decoder of a model. They hand each attention what it receives.

    Args:
        made: what that is outside `receiving`, asked for anew by each stack in each pass; nothing by default.

    Attributes:
        probed: what the layers of each attention saw of two tokens read and one written.

    Raises:
        BackboneError: the model's attention implementation cannot be given a prefix.
    """

    def __init__(self, model: PreTrainedModel, made: Callable[[], Mapping[Place, Injected]] = dict) -> None:
        self.model, self.previous, self.made = model, route(model), made
        self._received: Mapping[Place, Injected] | None = None
        stacks = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
        self._hooks = [
            stack.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            for name, stack in stacks.items()
        ]
        token = one_token(model)
        with evaluating(model):
            self.probed = self.look(token.expand(1, 2), token)
        for seen in self.probed.values():
            number(seen)
        model.__dict__[ATTACHMENT] = self

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        self.model.__dict__.pop(ATTACHMENT, None)
        for hook in self._hooks:
            hook.remove()
        uninstall(self.model, self.previous)

    @contextmanager
    def receiving(self, received: Mapping[Place, Injected]) -> Iterator[PreTrainedModel]:
        """The model with `received` in it for the length of a `with` block."""
        self._received = received
        try:
            yield self.model
        finally:
            self._received = None

    @torch.no_grad()
    def look(self, source: Tensor, target: Tensor) -> dict[Place, list[Seen]]:
        """What the layers of each attention see when `source` is read and `target` [batch, seq] written."""
        seen: dict[Place, list[Seen]] = {place: [] for place in ATTENTIONS}
        with self.receiving({place: Injected(seen=layers) for place, layers in seen.items()}) as model:
            read = model.get_encoder()(input_ids=source).last_hidden_state
            model.get_decoder()(input_ids=target, encoder_hidden_states=read, use_cache=False)
        return seen

    def _before(self, stack: str, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
        received = self.made() if self._received is None else self._received
        injected = received.get((stack, "self"), Injected())
        if stack == "decoder":
            injected = replace(injected, cross=received.get((stack, "cross"), Injected()))
        return arguments, {**keywords, KEYWORD: injected}


def measure_stacks(model: PreTrainedModel, where: str) -> dict[str, tuple[LayerGeometry, ...]]:
    """The geometry of `encoder` and `decoder`, from two tokens read and one written.

    Raises:
        BackboneError: attention that what is injected does not reach, layers whose keys and values are not one a token
            and head, or cross-attention of another shape than the decoder's self-attention, which no file could state.
    """
    stacks = Stacks(model)
    stacks.remove()
    seen = stacks.probed
    _refuse_unreached(model, seen, where)
    tokens = {("decoder", "self"): 1}
    measured = {place: _geometry(layers, tokens.get(place, 2), where) for place, layers in seen.items()}
    own, cross = measured["decoder", "self"], measured["decoder", "cross"]
    if own != cross:
        expected, found = "cross-attention of the shape of the decoder's self-attention", "another"
        raise BackboneError(where, expected=expected, found=f"{model.config.model_type}: {found}")
    return {"encoder": measured["encoder", "self"], "decoder": own}


def _refuse_unreached(model: PreTrainedModel, seen: Mapping[Place, list[Seen]], where: str) -> None:
    # What has a direction to look in is attention: each such module must have been reached once, as what it is.
    modules = sum(hasattr(module, "is_causal") for module in model.modules())
    reached = {id(layer.module) for layers in seen.values() for layer in layers}
    layers = {".".join(place): len(found) for place, found in seen.items()}
    if not modules == len(reached) == sum(layers.values()) or layers["decoder.self"] != layers["decoder.cross"]:
        told = ", ".join(f"{place} in {count} layers" for place, count in layers.items())
        expected = f"a prefix to reach all {modules} attention modules"
        raise BackboneError(where, expected=expected, found=f"{model.config.model_type}: {told}")


def _geometry(layers: list[Seen], tokens: int, where: str) -> tuple[LayerGeometry, ...]:
    for key, value in ((layer.key, layer.value) for layer in layers):
        if key.ndim != 4 or key.shape[2] != tokens or value.shape[:3] != key.shape[:3]:
            expected = f"keys and values [1, kv_heads, {tokens}, head_dim] in each layer"
            raise BackboneError(where, expected=expected, found=f"{tuple(key.shape)} and {tuple(value.shape)}")
    return tuple(layer.geometry for layer in layers)
