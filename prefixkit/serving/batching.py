"""Continuous batching: texts come and go while others are being written, each behind a prefix of its own.

(Yu et al. 2022, Orca, OSDI.) A text is admitted to a free row, its prefix is copied there, its prompt is read in one
pass with those admitted beside it, and from then on it takes part in every pass, one token at a time, until it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from prefixkit.serving.buffered_runtime import BufferedRuntime, Next
from prefixkit.serving.generation import Piece, Prompt
from prefixkit.serving.request import Progress, Request
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.writing_row import WritingRow
from prefixkit.task import ModelTokenizer


class Batching:
    """So many texts at once, of at most `capacity` slots each, and those that wait for a row.

    Attributes:
        waiting: texts that have no row yet, in the order in which they get one.
    """

    def __init__(self, runtime: BufferedRuntime, rows: int, capacity: int) -> None:
        self._rows = runtime.rows(rows, capacity)
        self.capacity = capacity
        self.waiting: deque[WritingRow] = deque()
        self._writing: list[WritingRow | None] = [None] * rows
        # What is recorded on a GPU has one size.
        self._fixed = runtime.device == "cuda"

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return sum(row is not None for row in self._writing)

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
        free = [row for row, one in enumerate(self._writing) if one is None][: len(self.waiting)]
        for row in free:
            self._writing[row] = self.waiting.popleft()
            self._rows.begin(row, self._at(row).prompt.before)
        return free

    def _passes(self, began: list[int]) -> Iterator[tuple[int, int]]:
        """Ranges of neighbours among the rows that `began`, whose prompts fit when they are padded to the longest."""
        group: list[int] = []
        for row in began:
            if group and (row != group[-1] + 1 or not self._fit([*group, row])):
                yield group[0], group[-1] + 1
                group = []
            group.append(row)
        if group:
            yield group[0], group[-1] + 1

    def _fit(self, rows: list[int]) -> bool:
        longest = max(len(self._at(row).prompt.ids) for row in rows)
        return int(self._rows.write_index[rows].max()) + longest <= self.capacity

    def _read(self, rows: range) -> list[Progress]:
        """Read the prompts of rows that began."""
        return self._advance(rows, self._rows.read(rows.start, [self._at(row).prompt.ids for row in rows]), rows)

    def _write(self, going: list[int]) -> list[Progress]:
        """One token more of the rows that are `going`, in one pass over all up to the last of them."""
        if not going:
            return []
        rows = range(len(self._writing)) if self._fixed else range(going[0], going[-1] + 1)
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
    """Write every prompt, all at once; row i draws with the seed of `sampling` and i more."""
    rows = []
    for row, prompt in enumerate(prompts):
        request = Request(prompt=tuple(prompt.ids), sampling=replace(sampling, seed=sampling.seed + row))
        rows.append(WritingRow(row, request, prompt, tokenizer))
    batch = Batching(runtime, len(rows), max(row.slots for row in rows))
    batch.waiting.extend(rows)
    while batch.waiting or batch.running:
        for progress in batch.step():
            yield Piece(progress.number, progress.text, progress.completion)
