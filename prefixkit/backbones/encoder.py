"""A frozen encoder of text: it reads the input as a whole, in both directions, and writes none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.attachment import Attachment, FixedPrefix, MakesPrefix
from prefixkit.backbones.attention import look
from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.deltas import changed
from prefixkit.backbones.encoder_layers import key_values_in
from prefixkit.backbones.geometry import one_input, reader_of
from prefixkit.backbones.hidden import added, fold_hidden
from prefixkit.backbones.packed import masks
from prefixkit.backbones.positions import first_position, refuse_unplaceable
from prefixkit.backbones.slots import filled, in_slots, token_vectors
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.injections import (
    EmbeddingPrompt,
    HiddenPrompt,
    Injection,
    KeyValuePrefix,
    One,
    PackedPrefixes,
    Received,
    Several,
    joined,
    part_of,
    parts_of,
    positions_of,
)
from prefixkit.task import SLOT_ID, load_tokenizer


@dataclass
class Encoder(Backbone):
    """An encoder with frozen weights, with its masked language model's head where the folder has one.

    A prompt in front of the text, or in slots of it, passes through the layers with the text, which it sees: it has no
    keys and values of its own. A hidden prompt whose rows begin anew in every layer has, and is folded.

    Attributes:
        geometry: the shape of each layer's keys and values.
    """

    kind = "encoder"
    paired: ClassVar[bool] = False
    geometry: tuple[LayerGeometry, ...]

    @cached_property
    def _attachment(self) -> Attachment:
        return Attachment(self.model)

    @cached_property
    def _windows(self) -> set[int | None]:
        """Of its layers' attention."""
        return {layer.window for layer in look(self._unhooked(), one_input(self.model))}

    @property
    def context_length(self) -> int | None:
        """Positions that text can stand at; RoBERTa leaves its first ones to padding."""
        length = self.identity.context_length
        return None if length is None else length - first_position(self.model)

    @property
    def longest_text(self) -> int | None:
        """Tokens that `key_values_of` takes at most."""
        return self.context_length

    @property
    def writes(self) -> bool:
        """Whether it has a language model's head, which tells words for masked ones."""
        return self.model.get_output_embeddings() is not None

    def room_for_text(self, length: int) -> int | None:
        """How many tokens of text the context has behind a prompt of `length` vectors."""
        return None if self.context_length is None else self.context_length - length

    def room_behind(self, prefix: Injection | None) -> int | None:
        """How many tokens of text the context has behind `prefix`."""
        return None if self.context_length is None else self.context_length - positions_of(prefix).text_start

    def refuse_unplaceable(self, received: Injection) -> None:
        """Refuse text positions that the model cannot give; see `prefixkit.backbones.positions`."""
        if received.length and in_slots(received) is None:
            refuse_unplaceable(self.model, positions_of(received), received.length)
        self.fold(received)

    def fold(self, received: Injection) -> Injection:
        """`received` with keys and values in the place of a hidden prompt of rows of its own."""
        assert self._attachment is not None
        with changed(self.model, received):
            return joined(tuple(self._folded(part) for part in parts_of(received)))

    def _folded(self, part: One) -> One:
        if isinstance(part, HiddenPrompt) and part.mode == "replace":
            return fold_hidden(self.model, part)
        if isinstance(part, KeyValuePrefix) and (part.stack, part.placement) != ("encoder", "prepend"):
            found = f"one of a {part.stack}" if part.placement == "prepend" else f"one in {part.placement}"
            raise MismatchError(self.identity.family, expected="a prefix of an encoder, before its text", found=found)
        if isinstance(part, EmbeddingPrompt) and part.placement == "prepend":
            self._refuse_apart(part)
        return part

    def _refuse_apart(self, prompt: EmbeddingPrompt) -> None:
        if prompt.positions.text_start != prompt.length:
            expected, found = f"text that starts at {prompt.length}, behind the prompt", prompt.positions.text_start
            raise BackboneError(self.identity.family, expected=expected, found=f"text that starts at {found}")

    @contextmanager
    def injected(self, received: Received | None) -> Iterator[PreTrainedModel]:
        """The model with the keys, values and deltas of `received` in it, for the length of a `with` block."""
        made = (
            masks(received, self._windows, self.model, causal=False) if isinstance(received, PackedPrefixes) else None
        )
        self._attachment.method, self._attachment.masks = self._method(received), made
        try:
            with changed(self.model, received):
                yield self.model
        finally:
            self._attachment.method = self._attachment.masks = None

    def _method(self, received: Received | None) -> MakesPrefix | None:
        if isinstance(received, Several):
            return lambda: received
        prefix = part_of(None if received is None else self.fold(received), KeyValuePrefix)
        return None if prefix is None else FixedPrefix(prefix)

    def states(self, inputs: Mapping[str, Tensor], received: Received | None = None) -> Tensor:
        """The final states [batch, seq, hidden] of `input_ids` [batch, seq], padded on the right."""
        prompt = part_of(received, EmbeddingPrompt)
        with self._reading(inputs, received) as keywords:
            states: Tensor = reader_of(self.model)(**keywords).last_hidden_state
        return without_rows(states, prompt)

    def target_logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Received | None = None
    ) -> Tensor:
        """The logits [tokens, vocab] at the tokens of `labels` [batch, seq] that are not -100: the masked ones.

        Raises:
            BackboneError: no head of a masked language model in the folder.
        """
        self.refuse_wordless()
        prompt = part_of(prefix, EmbeddingPrompt)
        chosen = with_rows(labels != -100, prompt)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with self._reading(inputs, prefix) as keywords, self._logits_only_at(chosen):
            logits: Tensor = self.model(**keywords).logits
        return logits[0]

    def refuse_wordless(self) -> None:
        """Raise BackboneError where there is no masked language model's head."""
        if not self.writes:
            expected, step = "the head of a masked language model", "use a task whose answer a head reads"
            raise BackboneError(self.folder, expected=expected, found="none in its weights", next_step=step)

    @contextmanager
    def _reading(self, inputs: Mapping[str, Tensor], received: Received | None) -> Iterator[dict[str, Any]]:
        """The model with `received` in it, and what to call it with."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        prompt, hidden = part_of(received, EmbeddingPrompt), _adding(received)
        keywords: dict[str, Any] = {"attention_mask": with_rows(mask, prompt, 1)}
        examples = received.examples if isinstance(received, PackedPrefixes) else None
        keywords |= {name: with_rows(types, prompt) for name, types in self.token_types(ids, examples).items()}
        keywords |= {"input_ids": ids} if prompt is None else {"inputs_embeds": self._vectors(ids, prompt)}
        places = None if hidden is None else with_rows(_places(ids, hidden), prompt)
        with self.injected(received), added(self.model, hidden, places):
            yield keywords

    def token_types(self, ids: Tensor, examples: Tensor | None = None) -> dict[str, Tensor]:
        """`token_type_ids`, for models that have types: 0 up to the first separator, 1 behind it.

        Args:
            examples: of a packed row, [seq], which example a token is of; each has types of its own.
        """
        separator = self.separator_id
        if getattr(self.model.config, "type_vocab_size", 0) < 2 or separator is None:
            return {}
        separators = (ids == separator).long()
        before = separators.cumsum(1) - separators
        if examples is not None:
            before = before - before[:, torch.searchsorted(examples, examples)]
        return {"token_type_ids": before.clamp(max=1)}

    @cached_property
    def separator_id(self) -> int | None:
        """The token that its tokenizer puts between two texts."""
        return load_tokenizer(self.folder).named_id("sep_token")

    def _vectors(self, ids: Tensor, prompt: EmbeddingPrompt) -> Tensor:
        if prompt.placement == "slots":
            return filled(self.model, ids, prompt)
        vectors = token_vectors(self.model, ids, prompt.embeddings.shape[1])
        rows = prompt.embeddings.to(vectors).expand(len(ids), -1, -1)
        begin, _ = rows_before(prompt)
        return torch.cat([vectors[:, :begin], rows, vectors[:, begin:]], dim=1)

    @torch.no_grad()
    def key_values_of(self, token_ids: list[int]) -> KeyValuePrefix:
        """The keys and values of a real text: a start, no equal of having it in the context."""
        if not token_ids:
            raise BackboneError("initialisation text", expected="at least one token", found="none")
        return key_values_in(self._unhooked(), {"input_ids": torch.tensor([token_ids], device=self.device)})

    def generate(self, prompts: Sequence[Sequence[int]], *_: Any, **__: Any) -> list[list[int]]:
        """Refused: an encoder writes no text. Raises BackboneError."""
        step = "use a task whose answer a head reads, or one with a verbalizer"
        raise BackboneError(self.identity.family, expected="a model that writes", found="an encoder", next_step=step)


def rows_before(prompt: EmbeddingPrompt | None) -> tuple[int, int]:
    """Where rows that are no tokens stand in the sequence: their begin and their end."""
    if prompt is None or prompt.placement == "slots":
        return 0, 0
    begin = 1 if prompt.placement == "after_first" else 0
    return begin, begin + prompt.length


def without_rows(states: Tensor, prompt: EmbeddingPrompt | None) -> Tensor:
    """`states` [batch, seq, …] of the input's own tokens alone."""
    begin, end = rows_before(prompt)
    return states if begin == end else torch.cat([states[:, :begin], states[:, end:]], dim=1)


def with_rows(each: Tensor, prompt: EmbeddingPrompt | None, value: int = 0) -> Tensor:
    """`each` [batch, seq], of the input's own tokens, with `value` where the prompt's rows stand."""
    begin, end = rows_before(prompt)
    rows = each.new_full((len(each), end - begin), value)
    return torch.cat([each[:, :begin], rows, each[:, begin:]], dim=1)


def _adding(received: Received | None) -> HiddenPrompt | None:
    prompt = part_of(received, HiddenPrompt)
    return prompt if prompt is not None and prompt.mode == "add" else None


def _places(ids: Tensor, prompt: HiddenPrompt) -> Tensor:
    """[batch, seq]: True where something is added."""
    if prompt.placement == "slots":
        return ids == SLOT_ID
    begin = 1 if prompt.placement == "after_first" else 0
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[:, begin : begin + prompt.length] = True
    return places
