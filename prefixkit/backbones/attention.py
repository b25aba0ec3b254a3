"""The attention hook: a prefix in front of the keys and values of every layer, the model's own code untouched.

`transformers` lets attention functions be registered by name. Ours prepends the prefix and hands over to the function
that the model used before, so padding, caching, generation and gradient checkpointing stay what they were: the cache
holds the text only, and the prefix is there whenever attention runs.

What is injected travels down as a keyword argument of one forward pass. No state is kept on the model: passes cannot
disturb each other, even when gradient checkpointing runs a layer again after a later pass.

Keys and values in slots of the text are written over those that the slots have, each time anew: what the cache holds
of a slot is never seen. Masks and positions stay the model's.

The text's mask is the model's own. The prefix's columns of the mask are ours: a sliding window counts real tokens from
the prefix, whatever padding the cache holds in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefixkit.backbones import short_attention
from prefixkit.backbones.geometry import evaluating, one_input, reader_of
from prefixkit.backbones.packed import Mask, attend
from prefixkit.backbones.trie import Trie
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry

KEYWORD = "prefixkit_injected"
"""The keyword argument of a decoder's forward pass that holds an `Injected`."""
ATTACHMENT = "_prefixkit_attachment"
"""The attribute of a model that holds what has hooks on it."""
_NAME = "prefixkit_{}"
_LAYER = "prefixkit_layer"


@dataclass(frozen=True)
class Injected:
    """What the attention layers of one stack receive in one forward pass.

    Attributes:
        keys, values: one tensor a layer, [kv_heads, prefix, head_dim], or [batch, kv_heads, prefix, head_dim] where
            each row has its own; empty without a prefix.
        lengths: [batch], how many of the slots are a row's own; None where all are.
        slots: [batch, text], which of the keys and values stands at each token of the text so far, from 0; -1 at those
            that keep their own. None for keys and values before the text.
        masks: in a packed row, those of the layers with each sliding window, in the place of the model's own.
        trie: in a row of nodes, whose they are; None for any other.
        query_index: [batch or 1, seq], how many real tokens of its row precede each query; None where none are counted.
        seen: where the layers that are handed this leave what they see, in the order of their work.
        cross: the same for the stack's cross-attention; None in a stack that has none.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    lengths: Tensor | None = None
    slots: Tensor | None = None
    query_index: Tensor | None = None
    masks: Mapping[int | None, Mask] | None = None
    trie: Trie | None = None
    seen: list[Seen] | None = None
    cross: Injected | None = None


@dataclass(frozen=True)
class Seen:
    """One attention layer in one forward pass.

    Attributes:
        module: the layer.
        key, value: [batch, kv_heads, seq, head_dim].
        window: its sliding window in tokens, None for full attention.
        mask: what it was given beside them.
    """

    module: nn.Module
    key: Tensor
    value: Tensor
    window: int | None
    mask: Tensor | None

    @property
    def geometry(self) -> LayerGeometry:
        """The shape of its keys and values."""
        heads, key_dim, value_dim = self.key.shape[1], self.key.shape[3], self.value.shape[3]
        return LayerGeometry(kv_heads=heads, key_dim=key_dim, value_dim=value_dim)

    @property
    def biased(self) -> bool:
        """Whether its mask says more than who sees whom; of a single token."""
        return self.mask is not None and self.mask.is_floating_point() and bool(self.mask.any())


def implementation(model: PreTrainedModel) -> str:
    """The name of the attention implementation of `model`.

    Raises:
        BackboneError: one that cannot be given a prefix.
    """
    where, name = model.config.model_type, str(model.config._attn_implementation)
    if name.startswith(_NAME.format("")):
        found = "a configuration that it shares with a model that has a prefix"
        raise BackboneError(where, expected="a configuration of its own", found=found, next_step="copy.deepcopy it")
    if name not in _ATTENTION:
        expected = "attention implementation sdpa or eager under a prefix"
        step = "load the model with attn_implementation='sdpa'"
        raise BackboneError(where, expected=expected, found=name, next_step=step)
    return name


def route(model: PreTrainedModel) -> str:
    """Send the attention of `model` through ours and return the name of the implementation that it had.

    Raises:
        BackboneError: an implementation that cannot be given a prefix.
    """
    previous = implementation(model)
    model.set_attn_implementation(_NAME.format(previous))
    return previous


def install(model: PreTrainedModel) -> str:
    """`route` for a decoder or an encoder, checked, its layers numbered.

    Raises:
        BackboneError: an implementation that cannot be given a prefix, or layers that are not handed what is injected,
            or would bias it.
    """
    previous = route(model)
    seen = _look(model, one_input(model))
    try:
        _refuse_unreached(model, seen)
    except BackboneError:
        model.set_attn_implementation(previous)
        raise
    number(seen)
    return previous


def _refuse_unreached(model: PreTrainedModel, seen: Sequence[Seen]) -> None:
    where, layers = model.config.model_type, model.config.num_hidden_layers
    reached = len({id(layer.module) for layer in seen})
    if not len(seen) == reached == layers:
        expected = f"a prefix to reach the attention of all {layers} layers"
        raise BackboneError(where, expected=expected, found=f"{reached}")
    if any(layer.biased for layer in seen):
        # What a slot's would be is made where we are not.
        expected, found = "attention that looks at keys and values alone", "a bias that its layers make of values"
        raise BackboneError(where, expected=expected, found=found, next_step="use a decoder such as Llama or GPT-2")


def number(seen: Sequence[Seen]) -> None:
    """Let each layer know its place among its own kind; not every model numbers its layers."""
    # A plain attribute goes along with copies, replicas and pickles.
    for index, layer in enumerate(seen):
        setattr(layer.module, _LAYER, index)


def uninstall(model: PreTrainedModel, previous: str) -> None:
    """Leave `model` as `install` found it."""
    model.set_attn_implementation(previous)
    for module in model.modules():
        module.__dict__.pop(_LAYER, None)


def look(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Seen]:
    """What each attention layer of a model without a prefix sees of `inputs`, in the order of their work.

    Raises:
        BackboneError: an implementation that cannot be given a prefix.
    """
    previous = route(model)
    try:
        return _look(model, inputs)
    finally:
        model.set_attn_implementation(previous)


def uses_registry(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through the registry of `transformers`; Falcon's and Bloom's does not."""
    return hasattr(sys.modules[type(reader_of(model)).__module__], "ALL_ATTENTION_FUNCTIONS")


@torch.no_grad()
def _look(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Seen]:
    seen: list[Seen] = []
    # Encoders know no cache, and decoders need none for this.
    cache = {"use_cache": False} if "use_cache" in signature(reader_of(model).forward).parameters else {}
    with evaluating(model):
        reader_of(model)(**inputs, **cache, **{KEYWORD: Injected(seen=seen)})
    return seen


def _own_eager(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    # Each modelling file has its own eager function (softcap, scaling).
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **keywords)


def _in_trie(attention: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> Any:
        trie = keywords.get(KEYWORD, Injected()).trie
        if trie is None:
            return attention(module, query, key, value, attention_mask, **keywords)
        query, key, value = map(trie.rows, (query, key, value))
        # What came is a stand-in: the model knows nothing of these rows.
        mask = _causal(query, key, keywords.get("sliding_window"))
        attended, _ = attention(module, query, key, value, mask, **keywords)
        return trie.row(attended), None

    return forward


def _prefixed(attention: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> Any:
        injected: Injected = keywords.pop(KEYWORD, Injected())
        # In a decoder only self-attention looks back; what is not causal looks at the encoder's output.
        causal = bool(getattr(module, "is_causal", True))
        if injected.cross is not None and not causal:
            injected = injected.cross
        window = keywords.get("sliding_window")
        if injected.seen is not None:
            injected.seen.append(Seen(module, key, value, window, attention_mask))
        length = injected.keys[0].shape[-2] if injected.keys else 0
        if length == 0 and injected.masks is None:
            return attention(module, query, key, value, attention_mask, **keywords)
        layer: int = getattr(module, _LAYER)
        if injected.masks is not None:
            key, value = _prepended(injected.keys[layer], key), _prepended(injected.values[layer], value)
            return attend(attention, module, query, key, value, injected.masks[window], **keywords)
        if injected.slots is not None:
            key = _with_slots(key, injected.keys[layer], injected.slots)
            value = _with_slots(value, injected.values[layer], injected.slots)
            return attention(module, query, key, value, attention_mask, **keywords)
        if attention_mask is None and causal and (query.shape[2] > 1 or window is not None):
            attention_mask = _causal(query, key)
        if attention_mask is None and injected.lengths is not None:
            attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        if attention_mask is not None:
            # A window in both directions is one of the text alone: its tokens all see the prefix.
            narrow = window if causal else None
            attention_mask = _with_prefix_columns(attention_mask, injected, narrow)
        if keywords.get("position_bias") is not None:
            # T5 biases by distance, and a slot is at none.
            keywords["position_bias"] = F.pad(keywords["position_bias"], (length, 0))
        key, value = _prepended(injected.keys[layer], key), _prepended(injected.values[layer], value)
        return attention(module, query, key, value, attention_mask, **keywords)

    return forward


_ATTENTION = {"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"], short_attention.NAME: short_attention.sdpa, "eager": _own_eager}
# At import, not at `install`: a model that was pickled with a prefix finds its attention when it is read back.
for _previous, _attention in _ATTENTION.items():
    AttentionInterface.register(_NAME.format(_previous), _in_trie(_prefixed(_attention)))
    AttentionMaskInterface.register(_NAME.format(_previous), ALL_MASK_ATTENTION_FUNCTIONS[_previous])


def _prepended(prefix: Tensor, own: Tensor) -> Tensor:
    """[batch, kv_heads, prefix + seq, head_dim], in the dtype and on the device of `own`."""
    return torch.cat([prefix.to(own.device, own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)


def _with_slots(own: Tensor, given: Tensor, slots: Tensor) -> Tensor:
    """`own` [batch, kv_heads, seq, head_dim] with `given` [kv_heads, prefix, head_dim] where `slots` say."""
    # Under a sliding window the cache holds the end of the text only.
    seen = slots[:, -own.shape[2] :]
    rows, columns = (seen >= 0).nonzero(as_tuple=True)
    made = own.clone()
    made[rows, :, columns] = given.to(own.device, own.dtype).transpose(0, 1)[seen[rows, columns]]
    return made


def _with_prefix_columns(mask: Tensor, injected: Injected, window: int | None) -> Tensor:
    slots = torch.arange(injected.keys[0].shape[-2], device=mask.device)
    if window is None and injected.lengths is None:
        return F.pad(mask, (len(slots), 0), value=True if mask.dtype == torch.bool else 0.0)
    own = len(slots) if injected.lengths is None else injected.lengths[:, None, None, None]
    visible = slots < own if window is None else _in_window(injected.query_index, slots, own, window)
    if mask.dtype != torch.bool:
        visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)
    batch = max(mask.shape[0], visible.shape[0])
    return torch.cat([visible.expand(batch, -1, mask.shape[2], -1), mask.expand(batch, -1, -1, -1)], dim=-1)


def _causal(query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """What attention does without a mask: one query sees all keys, several begin with the first, as in a static cache,
    which is longer than the text. With a `window`, in tokens, each sees the last of these alone."""
    seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    seen = seen if query.shape[2] == 1 else seen.tril()
    return seen if window is None else seen.triu(1 - window)


def _in_window(query_index: Tensor | None, slots: Tensor, length: Tensor | int, window: int) -> Tensor:
    """[batch, 1, seq, prefix]: a row's own slots in each query's window; slot j stands at j, token i at length + i."""
    assert query_index is not None
    return (slots < length) & (length + query_index[:, None, :, None] - slots < window)
