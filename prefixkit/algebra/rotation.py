"""Moving keys to other positions: rotary embeddings (Su et al. 2021, arXiv 2104.09864) undone and done again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefixkit.prefix import Array


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer turns its keys.

    Attributes:
        frequencies: [pairs] float32, the angle that a position adds, with the model's scaling. Twice as many dimensions
            turn, the first of each head; the others stay. Empty where a layer has no positions in its keys.
        interleaved: whether neighbours turn together; else dimension i turns with dimension i + pairs.
    """

    frequencies: Array
    interleaved: bool = False

    def moved(self, keys: Array, start: int, by: int) -> Array:
        """`keys` [kv_heads, prefix, key_dim], which stand at positions start, start + 1, …, moved by `by` positions.

        A factor on cosine and sine (YaRN) turns with them and needs no account.
        """
        pairs = len(self.frequencies)
        if not pairs or not by:
            return keys
        angles = self._angles(keys.shape[1], start + by) - self._angles(keys.shape[1], start)
        ours = slice(0, 2 * pairs, 2) if self.interleaved else slice(0, pairs)
        theirs = slice(1, 2 * pairs, 2) if self.interleaved else slice(pairs, 2 * pairs)
        cos, sin, wide = np.cos(angles), np.sin(angles), keys.astype(np.float64)
        moved = wide.copy()
        moved[..., ours] = wide[..., ours] * cos - wide[..., theirs] * sin
        moved[..., theirs] = wide[..., theirs] * cos + wide[..., ours] * sin
        return moved.astype(keys.dtype)

    def _angles(self, count: int, start: int) -> Array:
        """[count, pairs]: rounded as transformers rounds them, to float32, before they are subtracted."""
        positions = np.arange(start, start + count, dtype=np.float32)
        return (positions[:, None] * self.frequencies.astype(np.float32)).astype(np.float64)
