"""A frozen decoder: what training, folding and export ask of a backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from prefixkit.backbones.attachment import Attachment, FixedPrefix, MakesPrefix
from prefixkit.backbones.backbone import Backbone, without_habits
from prefixkit.backbones.deltas import changed
from prefixkit.backbones.folding import fold
from prefixkit.backbones.geometry import refuse_swallowed
from prefixkit.backbones.onednn import filling
from prefixkit.backbones.packed import masks
from prefixkit.backbones.positions import refuse_unplaceable
from prefixkit.backbones.slots import filled, in_slots, infix_of, numbered, refuse_infix
from prefixkit.backbones.trie import ENOUGH, Trie, trie
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import LayerGeometry, Positions
from prefixkit.injections import (
    Injection,
    KeyValuePrefix,
    One,
    PackedPrefixes,
    ParameterDelta,
    Received,
    RowPrefixes,
    Several,
    TaskHead,
    joined,
    part_of,
    parts_of,
    positions_of,
)


@dataclass
class Decoder(Backbone):
    """A decoder with frozen weights.

    Attributes:
        geometry: the shape of each layer's keys and values.
    """

    kind = "decoder"
    paired: ClassVar[bool] = False
    geometry: tuple[LayerGeometry, ...]

    @cached_property
    def _attachment(self) -> Attachment:
        return Attachment(self.model)

    @property
    def reads_tries(self) -> bool:
        """Whether what texts of a batch begin with alike is computed once; see `prefixkit.backbones.trie`."""
        return self.shares_beginnings and self._attachment.reads_tries

    @property
    def longest_text(self) -> int | None:
        """Tokens that `key_values_of` takes at most, by sliding windows and the context; None without a limit."""
        windows = [layer.window - 1 for layer in self.geometry if layer.window is not None]
        limits = windows if self.context_length is None else [*windows, self.context_length]
        return min(limits, default=None)

    def fold(self, received: Injection) -> Injection:
        """`received` with keys and values in the place of a prompt; see `prefixkit.backbones.folding`."""
        with changed(self.model, received):
            return joined(tuple(self._folded(part) for part in parts_of(received)))

    def _folded(self, part: One) -> One:
        # What stands behind real tokens has no keys and values of its own.
        apart = isinstance(part, (ParameterDelta, TaskHead)) or in_slots(part) is not None
        return part if apart else fold(self.model, part)

    def _text(self, ids: Tensor, received: Received | None) -> dict[str, Tensor]:
        """What the model is called with: `ids`, or their vectors with a prompt's in the slots."""
        prompt = in_slots(received)
        if prompt is not None:
            return {"inputs_embeds": filled(self.model, ids, prompt)}
        # A slot of keys and values reads as any token: nobody sees what becomes of it.
        return {"input_ids": ids if infix_of(received) is None else ids.clamp(min=0)}

    def key_values(self, received: Injection | None) -> KeyValuePrefix | None:
        """The keys and values of `received`; None where it has none."""
        return None if received is None else part_of(self.fold(received), KeyValuePrefix)

    def room_for_text(self, length: int) -> int | None:
        """How many tokens of text the context has behind a prefix of `length` slots; None where it has no end.

        Raises:
            BackboneError: a sliding window would swallow the prefix.
        """
        refuse_swallowed(self.geometry, length, self.identity.name)
        return None if self.context_length is None else self.context_length - length

    def room_behind(self, prefix: Injection | None) -> int | None:
        """How many tokens of text the context has behind `prefix`; None where it has no end."""
        return None if self.context_length is None else self.context_length - positions_of(prefix).text_start

    def refuse_unplaceable(self, received: Injection) -> None:
        """Refuse text that the model cannot place where it should start; see `prefixkit.backbones.positions`."""
        if infix_of(received) is not None:
            refuse_infix(self.model)
        elif received.length and in_slots(received) is None:
            refuse_unplaceable(self.model, positions_of(received), received.length)

    @contextmanager
    def injected(self, prefix: Received | None, ids: Tensor) -> Iterator[PreTrainedModel]:
        """The model with `prefix` in it for the length of a `with` block, in which it reads `ids` [batch, seq].

        Raises:
            MismatchError: another number of slots in a row than keys and values for them.
            BackboneError: keys and values in slots that the model cannot take.
        """
        self._attachment.method, self._attachment.slots = self._method(prefix, ids)
        try:
            if isinstance(prefix, PackedPrefixes):
                self._attachment.masks = masks(prefix, {layer.window for layer in self.geometry}, self.model)
            with changed(self.model, prefix):
                yield self.model
        finally:
            self._attachment.method = self._attachment.slots = self._attachment.masks = None
            self._attachment.trie = None

    def _numbered(self, ids: Tensor, made: KeyValuePrefix | None) -> Tensor | None:
        infix = infix_of(made)
        if infix is None:
            return None
        refuse_infix(self.model)
        return numbered(self.model, ids, infix.length)

    def _method(self, received: Received | None, ids: Tensor) -> tuple[MakesPrefix | None, Tensor | None]:
        """What the hooks ask for keys and values, and in which slots of `ids` these stand."""
        if isinstance(received, Several):
            return (lambda: received), None
        made = self.key_values(received)
        return None if made is None else FixedPrefix(made), self._numbered(ids, made)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None, prefix: Received | None = None) -> Tensor:
        """Next-token logits [batch, seq, vocab] of `input_ids` [batch, seq], each row as if it were alone.

        `attention_mask` [batch, seq] marks real tokens; padding may be on either side.
        """
        with self.injected(prefix, input_ids) as model:
            text = self._text(input_ids, prefix)
            logits: Tensor = model(**text, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def states(self, inputs: Mapping[str, Tensor], received: Received | None = None) -> Tensor:
        """The final states [batch, seq, hidden] of `input_ids` [batch, seq], each row as if it were alone."""
        with self.injected(received, inputs["input_ids"]) as model:
            text = self._text(inputs["input_ids"], received)
            mask = inputs.get("attention_mask")
            states: Tensor = model.get_decoder()(**text, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    def logits_where(
        self, chosen: Tensor, input_ids: Tensor, attention_mask: Tensor, prefix: Received | None = None
    ) -> Tensor:
        """Logits [chosen, vocab] at the positions where `chosen` [batch, seq] is True; no others are computed."""
        with self._logits_only_at(chosen):
            return self.logits(input_ids, attention_mask, prefix)[0]

    def target_logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Received | None = None
    ) -> Tensor:
        """The logits [tokens, vocab] that predict the tokens of `labels` [batch, seq] that are not -100.

        Each stands one position before its token, so that the first token of a row cannot be asked for, and nothing
        needs the last one. Where examples share a row it stays: what keeps them apart is as long as the row.
        """
        chosen = (labels != -100).roll(-1, dims=1)
        chosen[:, -1] = False
        if isinstance(prefix, PackedPrefixes):
            return self.logits_where(chosen, input_ids, attention_mask, prefix)
        if beginnings := self._trie(chosen, input_ids, attention_mask, prefix):
            return self._logits_in(beginnings, chosen, prefix)
        more = filling(self.model, len(labels), labels.shape[1] - 1) - 1
        chosen, input_ids, attention_mask = (F.pad(each, (0, more)) for each in (chosen, input_ids, attention_mask))
        return self.logits_where(chosen, input_ids, attention_mask, prefix)

    def _trie(self, chosen: Tensor, input_ids: Tensor, attention_mask: Tensor, prefix: Received | None) -> Trie | None:
        """The texts of a batch up to the last `chosen` token of each; None where they are read in padded rows."""
        in_text = in_slots(prefix) is not None or infix_of(prefix) is not None
        if in_text or not (self.reads_tries and chosen.any()):
            return None
        needed = chosen.int().flip(1).cummax(dim=1).values.flip(1).bool()
        if not attention_mask[needed].all():
            return None
        groups = prefix.owner.tolist() if isinstance(prefix, RowPrefixes) else [0] * len(input_ids)
        found = trie(input_ids, needed.sum(dim=1).clamp(min=1), groups)
        found = found.filled(filling(self.model, 1, found.size))
        return found if found.ids.numel() <= ENOUGH * input_ids[:, 1:].numel() else None

    def _logits_in(self, beginnings: Trie, chosen: Tensor, prefix: Received | None) -> Tensor:
        """`target_logits` where `chosen` [batch, seq] is True."""
        places = beginnings.nodes[chosen[:, : beginnings.nodes.shape[1]]]
        nodes = torch.zeros_like(beginnings.ids, dtype=torch.bool).index_fill_(1, places, True)
        with self.injected(prefix, beginnings.ids) as model, self._logits_only_at(nodes, places):
            self._attachment.trie = beginnings
            logits: Tensor = model(input_ids=beginnings.ids, use_cache=False).logits
        return logits[0]

    @torch.no_grad()
    def key_values_of(self, token_ids: list[int]) -> KeyValuePrefix:
        """The keys and values of a real text at positions 0, 1, …: a prefix equal to having that text in the context.

        Raises:
            BackboneError: an empty text, or one that a sliding window would swallow.
        """
        if not token_ids:
            raise BackboneError("initialisation text", expected="at least one token", found="none")
        refuse_swallowed(self.geometry, len(token_ids), self.identity.family)
        cache = DynamicCache()
        tokens = torch.tensor([token_ids], device=self.device)
        # Nobody reads the logits: of a long text they would be larger than everything else together.
        with self.injected(None, tokens) as model, self._logits_only_at(_last(tokens)):
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return KeyValuePrefix(
            keys=tuple(layer.keys[0].clone() for layer in cache.layers),
            values=tuple(layer.values[0].clone() for layer in cache.layers),
            positions=Positions(text_start=len(token_ids)),
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix: Injection | None = None,
        *,
        stop: Sequence[int],
        max_new_tokens: int,
        num_beams: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """What the model writes after each prompt, as if that prompt were alone.

        It ends before the first stop token, after `max_new_tokens`, or where the context does. A `temperature` above 0
        draws from the model's whole distribution, with `seed`; else it is greedy, or a beam search.

        Raises:
            BackboneError: a prompt that leaves no token of the context.
        """
        pad = stop[0] if stop else 0
        ends = list(stop) or None
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        settings = GenerationConfig(num_beams=num_beams, eos_token_id=ends, pad_token_id=pad, **drawn)
        limits = [self._new_tokens(len(prompt), prefix, max_new_tokens) for prompt in prompts]
        written: dict[int, list[int]] = {}
        # Rows are written for equally long: a row cannot stop at its own end of the context while others go on.
        for limit in sorted(set(limits)):
            settings.max_new_tokens = limit
            chosen = [index for index, own in enumerate(limits) if own == limit]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                rows = self._written([prompts[index] for index in chosen], prefix, settings)
            written.update(zip(chosen, rows, strict=True))
        return [list(takewhile(lambda token: token not in stop, written[index])) for index in range(len(prompts))]

    def _new_tokens(self, length: int, prefix: Injection | None, wanted: int) -> int:
        room = self.room_behind(prefix)
        if room is not None and length >= room:
            raise BackboneError(
                "prompt",
                expected=f"at most {room - 1} tokens, which leave one of the context of {self.context_length}",
                found=f"{length}",
                next_step="shorten it",
            )
        return wanted if room is None else min(wanted, room - length)

    def _written(
        self, prompts: Sequence[Sequence[int]], prefix: Injection | None, settings: GenerationConfig
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        rows = [[settings.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids = torch.tensor(rows, device=self.device)
        with self.injected(prefix, ids) as model, without_habits(model):
            text = self._text(ids, prefix)
            mask = torch.tensor(real, device=self.device)
            written = model.generate(**text, attention_mask=mask, generation_config=settings)
        # Behind vectors only what is new is returned.
        continuations: list[list[int]] = (written[:, width:] if "input_ids" in text else written).tolist()
        return continuations


def _last(tokens: Tensor) -> Tensor:
    """[batch, seq]: True at the end of each row."""
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[:, -1] = True
    return chosen
