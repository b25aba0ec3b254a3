"""The generation loop of graphs whose cache grows: one batch, token by token, until each row has stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from prefixkit.errors import InputError
from prefixkit.serving.generation import Piece, Prompt
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.writing_row import WritingRow, rows_of
from prefixkit.task import ModelTokenizer


class Batch(Protocol):
    """A batch in a runtime."""

    def feed(self, rows: Sequence[Sequence[int]]) -> Array:
        """Append token ids to each row and return their logits [batch, seq, vocab], padded on the left."""


class AnyRuntime(Protocol):
    """`prefixkit.serving.runtime.Runtime`, or that of an encoder-decoder."""

    def begin(self, prefixes: Sequence[Any], texts: Sequence[Sequence[int]]) -> tuple[Batch, Sequence[Sequence[int]]]:
        """A batch with a row for each prompt, and the token ids to feed it first."""


def write(
    runtime: AnyRuntime, tokenizer: ModelTokenizer, prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[Piece]:
    """Write every prompt in one batch. A row that has stopped waits as padding until the others have.

    Raises:
        InputError: no prompt.
    """
    if not prompts:
        raise InputError("prompts", expected="at least one", found="none")
    return _loop(runtime, rows_of(prompts, tokenizer, sampling))


def _loop(runtime: AnyRuntime, rows: Sequence[WritingRow]) -> Iterator[Piece]:
    prompts = [row.prompt for row in rows]
    decoding, fed = runtime.begin([prompt.prefix for prompt in prompts], [prompt.ids for prompt in prompts])
    going = list(range(len(rows)))
    while going:
        # Padding is on the left, so the last column is every row's newest token.
        logits = decoding.feed(fed)[:, -1]
        for index in list(going):
            progress = rows[index].advance(None, logits[index])
            if progress.completion is not None:
                going.remove(index)
            yield Piece(index, progress.text, progress.completion)
        fed = [row.written[-1:] if index in going else [] for index, row in enumerate(rows)]
