"""A prefix on a `transformers` model, in place: `attach` and `detach`.

After `attach` the same model object has a prefix and nothing else has changed: gradients, padding on either side,
gradient checkpointing, `generate`, `Trainer` and accelerate work as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from prefixkit.backbones.attention import (
    ATTACHMENT,
    KEYWORD,
    Injected,
    implementation,
    install,
    uninstall,
    uses_registry,
)
from prefixkit.backbones.cache_route import checkpoints, forget_cache, through_cache
from prefixkit.backbones.encoder_layers import measure_encoder
from prefixkit.backbones.folding import fold
from prefixkit.backbones.geometry import is_encoder, measure, reader_of, refuse_swallowed, refuse_untried
from prefixkit.backbones.identity import context_length, identify, origin
from prefixkit.backbones.packed import Mask
from prefixkit.backbones.pair import fitting
from prefixkit.backbones.positions import (
    first_position,
    has_alibi,
    query_index,
    refuse_unplaceable,
    takes_positions,
)
from prefixkit.backbones.stacks import Place, Stacks, measure_stacks, placed
from prefixkit.backbones.weights import is_pair
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry
from prefixkit.injections import (
    Injection,
    KeyValuePrefix,
    KeyValuePrefixes,
    PackedPrefixes,
    Received,
    RowPrefixes,
    Several,
    injection,
)
from prefixkit.prefix import Prefix, matches

_NAME = "prefixkit"


class MakesPrefix(Protocol):
    """A method: a module whose current parameters make what the model receives."""

    def __call__(self) -> Received: ...


class FixedPrefix(nn.Module):
    """A prefix that is not trained, as a method. It moves with its model, and has no place in a state dict."""

    def __init__(self, prefix: KeyValuePrefix | KeyValuePrefixes) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self) -> KeyValuePrefix | KeyValuePrefixes:
        """The prefix."""
        return self.prefix

    def _apply(self, move: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPrefix:
        if isinstance(self.prefix, KeyValuePrefixes):
            self.prefix = KeyValuePrefixes(parts=tuple(_moved(part, move) for part in self.prefix.parts))
        else:
            self.prefix = _moved(self.prefix, move)
        return self


def _moved(prefix: KeyValuePrefix, move: Callable[[Tensor], Tensor]) -> KeyValuePrefix:
    return replace(prefix, keys=tuple(map(move, prefix.keys)), values=tuple(map(move, prefix.values)))


class Attachment:
    """One model and what it receives. A hook on its decoder places the prefix and shifts the text's positions.

    Attributes:
        slots: of keys and values in slots, [batch, prompt]: which of them stands at each token of the prompts that are
            read, from 0; -1 where none does. None for a prefix before the text.
        masks: of a packed row; None for any other.

    Raises:
        BackboneError: the model has an attachment already, or its attention cannot be given a prefix.
    """

    def __init__(self, model: PreTrainedModel, method: MakesPrefix | None = None) -> None:
        _refuse_unready(model)
        self.model, self.method = model, method
        self.slots: Tensor | None = None
        self.masks: dict[int | None, Mask] | None = None
        self.frozen: list[nn.Parameter] = []
        self._install()
        model.__dict__[ATTACHMENT] = self

    def _install(self) -> None:
        model = self.model
        self.previous = install(model) if uses_registry(model) else None
        self.places = takes_positions(model)
        # The decoder itself, not `base_model`: some models (OPT) call it directly.
        decoder = reader_of(model)
        self._hooks = [decoder.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.previous is None:
            self._hooks.append(decoder.register_forward_hook(forget_cache, with_kwargs=True))

    def freeze(self) -> None:
        """Stop gradients into the backbone's parameters."""
        self.frozen = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad = False

    def remove(self) -> None:
        """Take the hook off and thaw what was frozen; the model is as it was."""
        del self.model.__dict__[ATTACHMENT]
        self._uninstall()
        for parameter in self.frozen:
            parameter.requires_grad = True

    def _uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.previous is not None:
            uninstall(self.model, self.previous)

    def _before(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = inspect.signature(module.forward).parameters
        keywords = {**dict(zip(names, arguments, strict=False)), **keywords}
        prefix = self._folded()
        tokens: Any = keywords.get("input_ids")
        tokens = keywords.get("inputs_embeds") if tokens is None else tokens
        if self.previous is None:
            if isinstance(prefix, Several):
                raise one_for_all(self.model.config.model_type)
            if prefix is not None and prefix.length:
                through_cache(self.model, prefix, tokens, keywords)
            return (), keywords
        _refuse_reentrant(self.model)
        if isinstance(prefix, PackedPrefixes):
            keywords.update(self._packed(prefix))
            return (), keywords
        index = self._place(tokens, prefix, keywords) if self.places else None
        keys, values = (prefix.keys, prefix.values) if prefix is not None else ((), ())
        lengths = prefix.lengths if isinstance(prefix, RowPrefixes) else None
        slots = self._slots(tokens, keywords)
        keywords[KEYWORD] = Injected(keys=keys, values=values, lengths=lengths, slots=slots, query_index=index)
        return (), keywords

    def _folded(self) -> KeyValuePrefix | Several | None:
        received = self.method() if self.method is not None else None
        return received if received is None or isinstance(received, Several) else fold(self.model, received)

    def _packed(self, prefix: PackedPrefixes) -> dict[str, Any]:
        """What the decoder is to be called with, to read a packed row."""
        if self.masks is None or not self.places:
            found, step = "a packed row", "use padded batches"
            raise BackboneError(self.model.config.model_type, expected="padded rows", found=found, next_step=step)
        injected = Injected(keys=prefix.keys, values=prefix.values, masks=self.masks)
        # Given a mask of four dimensions the model makes none of its own; ours take its place.
        stand_in = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=prefix.positions.device)
        positions = prefix.positions + first_position(self.model)
        return {"position_ids": positions, "attention_mask": stand_in, KEYWORD: injected}

    def _slots(self, tokens: Any, keywords: dict[str, Any]) -> Tensor | None:
        """[batch, text]: `slots` for the text so far. What is written behind a prompt is none, in each of its beams."""
        if self.slots is None:
            return None
        cache = keywords.get("past_key_values")
        text = tokens.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        rows = self.slots.repeat_interleave(tokens.shape[0] // self.slots.shape[0], dim=0)
        return F.pad(rows, (0, text - rows.shape[1]), value=-1)

    def _place(self, tokens: Any, prefix: KeyValuePrefix | RowPrefixes | None, keywords: dict[str, Any]) -> Tensor:
        """Give the text in `keywords` its positions, and say how many real tokens precede each of them."""
        given = keywords.get("position_ids") is not None
        index = query_index(tokens, keywords).clamp(min=0)
        start: Any = prefix.positions.text_start if isinstance(prefix, KeyValuePrefix) else 0
        start = prefix.starts[:, None] if isinstance(prefix, RowPrefixes) else start
        keywords["position_ids"] = index + start + (0 if given else first_position(self.model))
        return index


class PairAttachment(Attachment):
    """An encoder-decoder and what it receives. Each of its stacks asks the method anew in every pass.

    Attributes:
        geometry: of `encoder` and `decoder`.
    """

    def _install(self) -> None:
        self.geometry = measure_stacks(self.model, self.model.config.model_type)
        self._stacks = Stacks(self.model, self._made)

    def _uninstall(self) -> None:
        self._stacks.remove()

    def _made(self) -> dict[Place, Injected]:
        _refuse_reentrant(self.model)
        received = self.method() if self.method is not None else None
        if isinstance(received, Several):
            raise one_for_all(self.model.config.model_type)
        return placed(received if isinstance(received, KeyValuePrefixes) else None)


def attach(
    model: PreTrainedModel,
    prefix: Prefix | Injection | nn.Module,
    *,
    freeze: bool = True,
    allow_mismatch: bool = False,
) -> PreTrainedModel:
    """Give `model` a fixed prefix, or the trainable one that a method makes, in place.

    The method becomes the submodule `model.prefixkit`, so optimizers, `Trainer` and `state_dict` see its parameters,
    and `save_pretrained` writes them beside the backbone's; `snapshot` makes a prefix file of them. A loaded file is
    checked against the backbone that the model was loaded from; a model from no folder by its geometry only.

    The caller goes on as without a prefix: position ids, masks and caches count the text alone. Attention dropout acts
    on prefix slots too. Begin caches after `attach`. Falcon and Bloom take a prefix through their cache, so they
    refuse static caches and gradient checkpointing; every architecture refuses reentrant checkpointing.

    Args:
        model: a decoder of `transformers`, an encoder of text or images, or an encoder-decoder (BART, T5), with any
            head on it, computing attention with sdpa or eager.
        prefix: a loaded file, a `KeyValuePrefix`, an `EmbeddingPrompt` (folded once, here), or a method such as
            `methods.prefix_tuning.PrefixTuning`; for an encoder-decoder a file with prefixes, `KeyValuePrefixes`, or
            `methods.prefix_tuning.PrefixesTuning`.
        freeze: stop gradients into the backbone's parameters, heads included (`detach` lets flow what flowed before).
        allow_mismatch: take a file that was made for other weights, as long as the shapes fit.

    Returns:
        The same model.

    Raises:
        BackboneError: the model has a prefix already, or cannot take this one: its attention implementation, a sliding
            window that would swallow the prefix, no positions left for text, or none that it could be given, slots of a
            task that it does not know.
        MismatchError: the prefix has other layers or shapes than the model, or was made for another backbone.
    """
    _refuse_unready(model)
    if isinstance(prefix, Prefix):
        if not allow_mismatch:
            check_origin(prefix, model)
        prefix = injection(prefix)
    kept, kind = (fitting, PairAttachment) if is_pair(model.config) else (_kept, Attachment)
    with torch.no_grad():
        method = prefix if isinstance(prefix, nn.Module) else FixedPrefix(kept(model, prefix))
        kept(model, method())
    attachment = kind(model, method)
    if freeze:
        attachment.freeze()
    # Weights that accelerate keeps elsewhere are on "meta", which holds no numbers.
    model.add_module(_NAME, method if model.device.type == "meta" else method.to(model.device))
    return model


def _kept(model: PreTrainedModel, received: Injection) -> KeyValuePrefix:
    prefix = fold(model, received)
    check_fits(model, prefix)
    return prefix


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the prefix off; the model computes and trains what it did before `attach`.

    Raises:
        BackboneError: nothing is attached.
    """
    if not hasattr(model, _NAME):
        raise BackboneError(model.config.model_type, expected="an attached prefix", found="none")
    delattr(model, _NAME)
    model.__dict__[ATTACHMENT].remove()
    return model


def one_for_all(where: str) -> BackboneError:
    """What is raised where rows cannot have a prefix each."""
    found, step = "a prefix for each row", "give it one prefix at a time"
    return BackboneError(where, expected="one prefix for all rows", found=found, next_step=step)


def _refuse_unready(model: PreTrainedModel) -> None:
    where = model.config.model_type
    if hasattr(model, _NAME):
        raise BackboneError(where, found="a prefix that is attached already", next_step="call detach(model) first")
    if ATTACHMENT in model.__dict__:
        step = "call release() on that backbone first"
        raise BackboneError(where, found="a model that a loaded backbone is using", next_step=step)
    if is_pair(model.config):
        refuse_untried(model.config, where)
        implementation(model)
        return
    if uses_registry(model):
        implementation(model)
    if not takes_positions(model) and not has_alibi(model.config) and not is_encoder(model.config):
        raise BackboneError(
            where,
            expected="a model that places tokens by position ids or by counting its attention mask",
            found="one that counts the slots of its cache, where padding would part prefix and text",
            next_step="use a decoder such as Llama or GPT-2",
        )


def _refuse_reentrant(model: PreTrainedModel) -> None:
    """Refuse checkpointing with a backward pass for each layer: the graph of a method can be run through only once."""
    if not (torch.is_grad_enabled() and checkpoints(model)):
        return
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant", True):
            raise BackboneError(
                model.config.model_type,
                expected="gradient checkpointing with use_reentrant=False under a prefix",
                found="use_reentrant=True",
                next_step="leave it out where checkpointing is enabled: False is the default of transformers",
            )


def check_origin(prefix: Prefix, model: PreTrainedModel) -> None:
    """Refuse a file made for another backbone, where the folder that `model` was loaded from is known.

    Raises:
        MismatchError: another configuration or other weights.
    """
    folder = origin(model.config)
    if folder is not None:
        matches(prefix, _identified(model, folder))


def stacks_of(model: PreTrainedModel) -> dict[str, tuple[LayerGeometry, ...]]:
    """The geometry of an encoder-decoder's stacks, measured anew where nothing is attached."""
    attachment = model.__dict__.get(ATTACHMENT)
    if isinstance(attachment, PairAttachment):
        return attachment.geometry
    return measure_stacks(model, model.config.model_type)


def _identified(model: PreTrainedModel, folder: Path) -> BackboneIdentity:
    if is_pair(model.config):
        stacks = stacks_of(model)
        return identify(folder, folder.name, None, model.config, stacks["decoder"], encoder=stacks["encoder"])
    if is_encoder(model.config):
        return identify(folder, folder.name, None, model.config, (), encoder=measure_encoder(model))
    return identify(folder, folder.name, None, model.config, measure(model, model.config.model_type))


def check_fits(model: PreTrainedModel, prefix: KeyValuePrefix) -> None:
    """Refuse a prefix whose layers or shapes are not the model's.

    Raises:
        MismatchError: another number of layers, or other key and value shapes.
        BackboneError: it stands in slots of the text, a sliding window would swallow it, no position is left for text,
            or the model cannot place text where the prefix wants it.
    """
    where = model.config.model_type
    stack = "encoder" if is_encoder(model.config) else "decoder"
    if prefix.stack != stack:
        raise MismatchError(where, expected=f"a prefix of an {stack}", found=f"one of an {prefix.stack}")
    if prefix.placement != "prepend":
        runs = "`prefixkit train` and `prefixkit eval` run it"
        expects, among = "a prefix before the text", "one in slots of the text"
        raise BackboneError(where, expected=expects, found=among, next_step=runs)
    geometry = measure_encoder(model) if stack == "encoder" else measure(model, where)
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in geometry]
    found = [
        (key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]
    step = "use the backbone that the prefix was trained on"
    if len(expected) != len(found):
        raise MismatchError(where, expected=f"{len(expected)} layers", found=f"{len(found)}", next_step=step)
    for index, shapes in enumerate(zip(expected, found, strict=True)):
        if shapes[0] != shapes[1]:
            named = f"layer {index} with (kv_heads, key_dim, value_dim) {shapes[0]}"
            raise MismatchError(where, expected=named, found=f"{shapes[1]}", next_step=step)
    refuse_swallowed(geometry, prefix.length, where)
    refuse_unplaceable(model, prefix.positions, prefix.length)
    room, start = context_length(model.config), prefix.positions.text_start
    if room is not None and start >= room - first_position(model):
        raise BackboneError(
            where,
            expected=f"a prefix that leaves room in the model's {room} positions",
            found=f"text that starts at {start}",
            next_step="use a shorter prefix",
        )
