"""What a frozen backbone can receive: the one seam between methods and everything that consumes their results.

Axis names: batch, seq, prefix, hidden, layer, kv_heads, head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from prefixkit.errors import InputError
from prefixkit.format import names
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.prefix import Array, Prefix, key_values


@dataclass(frozen=True, kw_only=True)
class KeyValuePrefix:
    """Keys and values that every token of the text can attend to, in every layer.

    Li & Liang 2021 (arXiv 2101.00190) train them as prefix-tuning.

    Attributes:
        keys: one tensor a layer, [kv_heads, prefix, head_dim], as attention consumes them (after RoPE and qk-norm).
        values: the same for values.
        positions: where the text that follows starts counting.
        frozen_slots: how many leading slots training leaves alone.
        stack, attention: where they go: `decoder` and `self`, or one of the three places of an encoder-decoder.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Positions
    frozen_slots: int = 0
    stack: str = field(default="decoder")
    attention: str = field(default="self")

    @property
    def length(self) -> int:
        """The number of prefix slots."""
        return self.keys[0].shape[-2]

    @property
    def place(self) -> str:
        """`decoder.self`, `encoder.self` or `decoder.cross`."""
        return f"{self.stack}.{self.attention}"

    def record(self) -> InjectionRecord:
        """How a manifest describes this injection."""
        return InjectionRecord(
            kind="key_value_prefix",
            stack=self.stack,
            attention=self.attention,
            length=self.length,
            positions=self.positions,
            frozen_slots=self.frozen_slots,
        )

    def arrays(self) -> dict[str, Array]:
        """The tensors under the names that a prefix file gives them."""
        stored = {}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            stored[names.key(self.stack, self.attention, layer)] = _array(key)
            stored[names.value(self.stack, self.attention, layer)] = _array(value)
        return stored


@dataclass(frozen=True, kw_only=True)
class EmbeddingPrompt:
    """Input vectors before the text, in the place of token vectors.

    Lester et al. 2021 (arXiv 2104.08691) train them as prompt tuning.

    Attributes:
        embeddings: [prefix, hidden], after the model's embedding scale, before position embeddings are added.
        positions: where the text that follows starts counting; the prompt stands at the positions before it.
        token_ids: the tokens that the vectors equal, where they are real ones.
    """

    embeddings: Tensor
    positions: Positions
    token_ids: tuple[int, ...] | None = None
    stack: str = field(default="decoder")

    @property
    def length(self) -> int:
        """The number of prompt vectors."""
        return self.embeddings.shape[0]

    def record(self) -> InjectionRecord:
        """How a manifest describes this injection."""
        return InjectionRecord(
            kind="embedding_prompt",
            stack=self.stack,
            length=self.length,
            placement="prepend",
            positions=self.positions,
            token_ids=self.token_ids,
        )

    def arrays(self) -> dict[str, Array]:
        """The tensor under the name that a prefix file gives it."""
        return {names.PROMPT: _array(self.embeddings)}


@dataclass(frozen=True, kw_only=True)
class KeyValuePrefixes:
    """Prefixes for an encoder-decoder: one a place, of its encoder, its decoder, and between the two.

    Attributes:
        parts: at most one a place, at least one in all; they share nothing.
    """

    parts: tuple[KeyValuePrefix, ...]

    @property
    def length(self) -> int:
        """The number of slots of the longest part."""
        return max(part.length for part in self.parts)

    @property
    def positions(self) -> Positions:
        """Where the text starts; every part says the same."""
        return self.parts[0].positions

    def arrays(self) -> dict[str, Array]:
        """The tensors of all parts under the names that a prefix file gives them."""
        return {name: array for part in self.parts for name, array in part.arrays().items()}


Injection = KeyValuePrefix | KeyValuePrefixes | EmbeddingPrompt
"""The union of injections that a method may return. It is closed: a new kind means a new version of the schema."""


def records_of(received: Injection) -> tuple[InjectionRecord, ...]:
    """How a manifest describes `received`: one record, or one for each part."""
    if isinstance(received, KeyValuePrefixes):
        return tuple(part.record() for part in received.parts)
    return (received.record(),)


def injection(prefix: Prefix) -> Injection:
    """What a loaded file injects.

    Raises:
        InputError: injections that this version cannot place.
    """
    records, stacks = prefix.manifest.injections, prefix.manifest.backbone.stacks
    if stacks.keys() == {"encoder", "decoder"} and all(record.kind == "key_value_prefix" for record in records):
        places = ((record.stack or "", record.attention or "") for record in records)
        return KeyValuePrefixes(parts=tuple(_stored_prefix(prefix, *place) for place in places))
    if len(records) == 1 and records[0].kind == "key_value_prefix":
        return key_value_prefix(prefix)
    if len(records) == 1 and (records[0].kind, records[0].placement) == ("embedding_prompt", "prepend"):
        return embedding_prompt(prefix)
    found = ", ".join(" ".join(filter(None, (record.kind, record.placement, record.mode))) for record in records)
    raise InputError("prefix", expected="keys and values, or a prepended prompt", found=found)


def embedding_prompt(prefix: Prefix) -> EmbeddingPrompt:
    """The prompt of a loaded file, in the dtype that it is stored in."""
    record = next(record for record in prefix.manifest.injections if record.kind == "embedding_prompt")
    assert record.length is not None
    return EmbeddingPrompt(
        embeddings=_tensor(prefix.tensors[names.PROMPT]),
        positions=record.positions or Positions(text_start=record.length),
        token_ids=record.token_ids,
        stack=record.stack or "decoder",
    )


def key_value_prefix(prefix: Prefix) -> KeyValuePrefix:
    """The keys and values that a loaded file has for a decoder, in the dtype that they are stored in.

    Raises:
        InputError: it has none.
    """
    return _stored_prefix(prefix, "decoder", "self")


def _stored_prefix(prefix: Prefix, stack: str, attention: str) -> KeyValuePrefix:
    pairs = [(_tensor(key), _tensor(value)) for key, value in key_values(prefix, stack=stack, attention=attention)]
    place = ("key_value_prefix", stack, attention)
    records = prefix.manifest.injections
    record = next(record for record in records if (record.kind, record.stack, record.attention) == place)
    assert record.positions is not None
    return KeyValuePrefix(
        keys=tuple(key for key, _ in pairs),
        values=tuple(value for _, value in pairs),
        positions=record.positions,
        frozen_slots=record.frozen_slots or 0,
        stack=stack,
        attention=attention,
    )


def _array(tensor: Tensor) -> Array:
    # torch and numpy share no bfloat16: its bits travel as integers.
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()


def _tensor(array: Array) -> Tensor:
    # A copy: the arrays of a loaded file are read-only, which torch does not know.
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
