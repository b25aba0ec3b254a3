"""What is to be written, and what was."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from prefixkit.serving.pair_prefix import ServedPrefixes
from prefixkit.serving.prefix_table import ServedPrefix

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row to write: its token ids, what stands before them, and where it ends.

    A decoder goes on where the ids end; an encoder-decoder reads them and then begins to write.
    """

    ids: Sequence[int]
    prefix: ServedPrefix | ServedPrefixes | None
    stop: Sequence[int]
    max_new_tokens: int
    silent: Set[int] = frozenset()
    """Tokens that are written but belong to no text, such as the BOS that BART begins with."""
    shared: bool = False
    """Whether a decoder's prefix is read where it is kept for several rows."""

    @property
    def before(self) -> ServedPrefix | None:
        """What stands before the ids of a decoder."""
        assert not isinstance(self.prefix, ServedPrefixes)
        return self.prefix

    @property
    def slots(self) -> int:
        """What prefix and ids of a decoder take of a cache of their own."""
        return len(self.ids) + (self.before.length if self.before is not None and not self.shared else 0)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written for one prompt.

    Attributes:
        text: without white space at either end.
        token_ids: what was written, without the stop token.
        finish: `stop` after a stop token or a stop text, `length` when the tokens allowed were used up.
        prompt_tokens: how many tokens the prompt had.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """More text of one row. The last piece of a row, whose text may be empty, has its completion."""

    row: int
    text: str
    completion: Completion | None = None
