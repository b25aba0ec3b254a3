"""Keys and values in front of the text's own, or among them, in every layer of an attention, or of several."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prefixkit.format import names
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.injections.arrays import array
from prefixkit.prefix import Array


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
        placement: `prepend`, before the text; `slots`, on a decoder, in the place of the keys and values that the slots
            of the task's template have: what stands before a slot does not see it.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: Positions
    frozen_slots: int = 0
    stack: str = field(default="decoder")
    attention: str = field(default="self")
    placement: str = field(default="prepend")

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
            placement=None if self.placement == "prepend" else self.placement,
        )

    def arrays(self) -> dict[str, Array]:
        """The tensors under the names that a prefix file gives them."""
        stored = {}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            stored[names.key(self.stack, self.attention, layer)] = array(key)
            stored[names.value(self.stack, self.attention, layer)] = array(value)
        return stored


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
