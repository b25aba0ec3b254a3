"""The generation loop: a batch of prompts, token by token, until each row has stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from prefixkit.errors import InputError
from prefixkit.serving.pair_prefix import ServedPrefixes
from prefixkit.serving.prefix_table import Array, ServedPrefix
from prefixkit.serving.sampling import Sampler, Sampling
from prefixkit.serving.streaming import TextStream
from prefixkit.task import ModelTokenizer

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

    @property
    def before(self) -> ServedPrefix | None:
        """What stands before the ids of a decoder."""
        assert not isinstance(self.prefix, ServedPrefixes)
        return self.prefix

    @property
    def slots(self) -> int:
        """What prefix and ids of a decoder take of a cache."""
        return len(self.ids) + (self.before.length if self.before is not None else 0)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was written for one prompt.

    Attributes:
        text: without white space at either end.
        token_ids: what was written, without the stop token.
        finish: `stop` after a stop token, `length` when the tokens allowed were used up.
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


@dataclass
class _Row:
    """A row in progress."""

    prompt: Prompt
    sampler: Sampler
    stream: TextStream
    written: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False


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
    rows = [
        _Row(prompt, Sampler(sampling, index, prompt.ids), TextStream(tokenizer))
        for index, prompt in enumerate(prompts)
    ]
    return _loop(runtime, rows)


def _loop(runtime: AnyRuntime, rows: list[_Row]) -> Iterator[Piece]:
    prompts = [row.prompt for row in rows]
    decoding, fed = runtime.begin([prompt.prefix for prompt in prompts], [prompt.ids for prompt in prompts])
    while True:
        # Padding is on the left, so the last column is every row's newest token.
        logits = decoding.feed(fed)[:, -1]
        for index, row in enumerate(rows):
            if not row.done:
                yield _advance(row, index, row.sampler.choose(logits[index]))
        if all(row.done for row in rows):
            return
        fed = [[] if row.done else row.written[-1:] for row in rows]


def _advance(row: _Row, index: int, token: int) -> Piece:
    if token in row.prompt.stop:
        return _finish(row, index, "stop", "")
    row.written.append(token)
    text = "" if token in row.prompt.silent else row.stream.push(token)
    row.text += text
    if len(row.written) == row.prompt.max_new_tokens:
        return _finish(row, index, "length", text)
    return Piece(index, text)


def _finish(row: _Row, index: int, finish: Finish, text: str) -> Piece:
    rest = row.stream.finish()
    row.done, row.text = True, row.text + rest
    completion = Completion(
        text=row.text, token_ids=tuple(row.written), finish=finish, prompt_tokens=len(row.prompt.ids)
    )
    return Piece(index, text + rest, completion)
