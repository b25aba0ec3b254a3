"""Continuous batching: texts come and go while others are being written, each behind a prefix of its own.

(Yu et al. 2022, Orca, OSDI.) A text is admitted to a free row, its prefix is copied there, its prompt is read in one
pass with those admitted beside it, and from then on it takes part in every pass, one token at a time, until it is done.
A prefix that several rows share is not copied: they read it in one place, which holds one such prefix at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from prefixkit.errors import InputError
from prefixkit.serving.bound_pass import Next
from prefixkit.serving.buffered_runtime import BufferedRuntime, Rows
from prefixkit.serving.generation import Piece, Prompt
from prefixkit.serving.request import Progress
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.writing_row import WritingRow, rows_of
from prefixkit.task import ModelTokenizer

PASS = 64
"""What a pass costs by itself, in tokens: prompts are padded to stand together for as much."""


class Batching:
    """Texts in `rows`, and those that wait for one.

    Attributes:
        waiting: texts that have no row yet, in the order in which they get one.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.waiting: deque[WritingRow] = deque()
        self._writing: list[WritingRow | None] = [None] * rows.count

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return sum(row is not None for row in self._writing)

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return len(self._writing) - self.running

    def cancel(self, number: int) -> None:
        """Forget a text. One that is unknown, or done, is ignored."""
        self.waiting = deque(row for row in self.waiting if row.number != number)
        for row, one in enumerate(self._writing):
            if one is not None and one.number == number:
                self._free(row)

    def step(self) -> list[Progress]:
        """Admit what waits, as far as there are rows, and write one token of everything."""
        began = self._admit()
        going = [row for row, one in enumerate(self._writing) if one is not None and row not in began]
        found = [progress for first, end in self._passes(began) for progress in self._read(range(first, end))]
        return found + self._write(going)

    def _admit(self) -> list[int]:
        """Give rows to those who wait; gives the rows."""
        # Prompts of like length beside each other: they are read together.
        admitted = sorted(self._next(), key=lambda one: len(one.prompt.ids))
        free = [row for row, one in enumerate(self._writing) if one is None][: len(admitted)]
        for row, one in zip(free, admitted, strict=True):
            self._writing[row] = one
            self._rows.begin(row, one.prompt.before, shared=one.prompt.shared)
        return free

    def _next(self) -> list[WritingRow]:
        """Those whose turn it is. One that wants another shared prefix than is being read holds the others up, so that
        its turn comes."""
        taken: list[WritingRow] = []
        read = {one.prompt.before for one in self._writing if one is not None and one.prompt.shared}
        while self.waiting and len(taken) < self.free:
            prompt = self.waiting[0].prompt
            if prompt.shared and read - {prompt.before}:
                break
            read |= {prompt.before} if prompt.shared else set()
            taken.append(self.waiting.popleft())
        return taken

    def _passes(self, began: list[int]) -> Iterator[tuple[int, int]]:
        """Ranges of neighbours among the rows that `began`, whose prompts are read together."""
        group: list[int] = []
        for row in began:
            if group and (row != group[-1] + 1 or not self._alike([*group, row])):
                yield group[0], group[-1] + 1
                group = []
            group.append(row)
        if group:
            yield group[0], group[-1] + 1

    def _alike(self, rows: list[int]) -> bool:
        """Whether the prompts of `rows` fit, and waste little, when they are padded to the longest."""
        lengths = [len(self._at(row).prompt.ids) for row in rows]
        padding = len(rows) * max(lengths) - sum(lengths)
        return padding <= PASS and int(self._rows.write_index[rows].max()) + max(lengths) <= self._rows.capacity

    def _read(self, rows: range) -> list[Progress]:
        """Read the prompts of rows that began."""
        return self._advance(rows, self._rows.read(rows.start, [self._at(row).prompt.ids for row in rows]), rows)

    def _write(self, going: list[int]) -> list[Progress]:
        """One token more of the rows that are `going`, in one pass over all up to the last of them."""
        if not going:
            return []
        rows = range(len(self._writing)) if self._rows.whole else range(going[0], going[-1] + 1)
        newest = [self._at(row).written[-1:] if row in going else [] for row in rows]
        return self._advance(rows, self._rows.read(rows.start, newest), going)

    def _advance(self, rows: range, found: Next, going: Iterable[int]) -> list[Progress]:
        progress = []
        for row in going:
            one, place = self._at(row), row - rows.start
            likeliest = int(found.tokens[place]) if one.takes_likeliest else None
            progress.append(one.advance(likeliest, None if one.takes_likeliest else found.logits[place]))
            if progress[-1].completion is not None:
                self._free(row)
        return progress

    def _free(self, row: int) -> None:
        self._writing[row] = None
        self._rows.begin(row, None)

    def _at(self, row: int) -> WritingRow:
        one = self._writing[row]
        assert one is not None
        return one


def write_in_buffers(
    runtime: BufferedRuntime, tokenizer: ModelTokenizer, prompts: Sequence[Prompt], sampling: Sampling
) -> Iterator[Piece]:
    """Write every prompt, all at once; row i draws with the seed of `sampling` and i more.

    Raises:
        InputError: no prompt, or more than there is memory for.
    """
    if not prompts:
        raise InputError("prompts", expected="at least one", found="none")
    texts = rows_of(prompts, tokenizer, sampling)
    batching = Batching(runtime.rows(len(texts), max(text.slots for text in texts)))
    batching.waiting.extend(texts)
    return _until_done(batching)


def _until_done(batching: Batching) -> Iterator[Piece]:
    while batching.waiting or batching.running:
        for progress in batching.step():
            yield Piece(progress.number, progress.text, progress.completion)
