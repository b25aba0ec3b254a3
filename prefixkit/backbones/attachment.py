"""What hangs on a model that has a prefix: hooks that place it, and shift the positions of the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from prefixkit.backbones.compiled import is_compiled
from prefixkit.backbones.folding import fold
from prefixkit.backbones.geometry import is_encoder, looks_back, reader_of, refuse_untried
from prefixkit.backbones.packed import Mask
from prefixkit.backbones.positions import first_position, has_alibi, query_index, takes_positions
from prefixkit.backbones.stacks import Place, Stacks, measure_stacks, placed
from prefixkit.backbones.trie import Trie
from prefixkit.backbones.weights import is_pair
from prefixkit.errors import BackboneError
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes, PackedPrefixes, Received, RowPrefixes, Several

NAME = "prefixkit"
"""The submodule of a model that holds a prefix which the caller attached."""


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
        trie: of a row of nodes; None for any other.

    Raises:
        BackboneError: the model has an attachment already, or its attention cannot be given a prefix.
    """

    def __init__(self, model: PreTrainedModel, method: MakesPrefix | None = None) -> None:
        refuse_unready(model)
        self.model, self.method = model, method
        self.slots: Tensor | None = None
        self.masks: dict[int | None, Mask] | None = None
        self.trie: Trie | None = None
        self.frozen: list[nn.Parameter] = []
        self._install()
        model.__dict__[ATTACHMENT] = self

    def _install(self) -> None:
        model = self.model
        self.previous = install(model) if uses_registry(model) else None
        self.places, self.looks_back = takes_positions(model), looks_back(model)
        # The decoder itself, not `base_model`: some models (OPT) call it directly.
        decoder = reader_of(model)
        self._hooks = [decoder.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.previous is None:
            self._hooks.append(decoder.register_forward_hook(forget_cache, with_kwargs=True))

    @property
    def reads_tries(self) -> bool:
        """Whether a row of nodes would be read, and faster: on CUDA packed rows are in its place."""
        by_torch = self.previous is not None and self.previous.endswith("sdpa") and self.places
        plainly = self.looks_back and not (self.model.training or is_compiled(self.model))
        return by_torch and plainly and self.model.device.type == "cpu"

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
        keys, values = (prefix.keys, prefix.values) if prefix is not None else ((), ())
        lengths = prefix.lengths if isinstance(prefix, RowPrefixes) else None
        injected = Injected(keys=keys, values=values, lengths=lengths)
        if self.trie is not None:
            keywords.update(self._in_trie(prefix, self.trie, injected))
            return (), keywords
        index = self._place(tokens, prefix, keywords) if self.places else None
        keywords[KEYWORD] = replace(injected, slots=self._slots(tokens, keywords), query_index=index)
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
        return self._in_a_row(prefix.positions, injected)

    def _in_trie(self, prefix: KeyValuePrefix | RowPrefixes | None, trie: Trie, injected: Injected) -> dict[str, Any]:
        """What the decoder is to be called with, to read a row of nodes."""
        start = prefix.starts[trie.owners] if isinstance(prefix, RowPrefixes) else _text_start(prefix)
        places = torch.arange(trie.nodes.shape[1], device=trie.nodes.device)[None]
        return self._in_a_row(trie.depths + start, replace(injected, query_index=places, trie=trie))

    def _in_a_row(self, positions: Tensor, injected: Injected) -> dict[str, Any]:
        # Given a mask of four dimensions the model makes none of its own; ours take its place.
        stand_in = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=positions.device)
        positions = positions + first_position(self.model)
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
        start = prefix.starts[:, None] if isinstance(prefix, RowPrefixes) else _text_start(prefix)
        keywords["position_ids"] = index + start + (0 if given else first_position(self.model))
        return index


def _text_start(prefix: KeyValuePrefix | None) -> int:
    return prefix.positions.text_start if prefix is not None else 0


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


def one_for_all(where: str) -> BackboneError:
    """What is raised where rows cannot have a prefix each."""
    found, step = "a prefix for each row", "give it one prefix at a time"
    return BackboneError(where, expected="one prefix for all rows", found=found, next_step=step)


def refuse_unready(model: PreTrainedModel) -> None:
    """Raise BackboneError for a model that has a prefix already, or whose attention cannot be given one."""
    where = model.config.model_type
    if hasattr(model, NAME):
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
