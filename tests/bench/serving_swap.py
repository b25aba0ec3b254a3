"""A prefix into the table of a session that is writing: no reload, and how long the next pass waits for it."""

from __future__ import annotations

import time
from pathlib import Path

from prefixkit.prefix import load, save
from prefixkit.serving.request import Request
from tests.bench.rounds import Row, alternate, row
from tests.bench.serving_ours import OurEngine, written
from tests.bench.serving_work import Effort, Tell, UnequalError, Work

BAR = 5.0
"""Milliseconds."""


class _Swapping:
    """An engine that writes without end in all rows but one, which tries the new prefix."""

    def __init__(self, work: Work) -> None:
        self.ours, self.work = OurEngine(work), work
        self.session, self.engine = self.ours.session, self.ours.engine
        self.file = Path(work.buffered).with_name("swapped.safetensors")
        self.prefix = save(work.prefixes[-1], self.file)

    def from_memory(self, _: int) -> float:
        """Milliseconds into the table, of a prefix that is loaded."""
        self._busy()
        began = time.perf_counter()
        self.session.add_prefix("swapped", self.prefix)
        return 1000 * (time.perf_counter() - began)

    def from_file(self, _: int) -> float:
        """Milliseconds into the table, of a file: read, judged, its digest compared."""
        self._busy()
        began = time.perf_counter()
        self.session.add_prefix("swapped", load(self.file))
        return 1000 * (time.perf_counter() - began)

    def reload(self, _: int) -> float:
        """Milliseconds of a session that is loaded anew instead, ready to write."""
        began = time.perf_counter()
        OurEngine(self.work, [self.prefix])
        return 1000 * (time.perf_counter() - began)

    def admitting(self, _: int) -> float:
        """Milliseconds of the pass that admits a text behind a new prefix, which goes to the device then."""
        return self._admitting("swapped")

    def admitting_known(self, _: int) -> float:
        """The same behind a prefix that is there already."""
        return self._admitting("row 0")

    def _admitting(self, name: str) -> float:
        self._busy()
        if name == "swapped":
            self.session.add_prefix(name, self.prefix)
        self.engine.submit(Request(prompt=self.work.prompts()[0], prefix=name, max_new_tokens=1))
        began = time.perf_counter()
        self.engine.step()
        return 1000 * (time.perf_counter() - began)

    def _busy(self) -> None:
        """Fill all rows but one, and write a token."""
        for number in range(self.work.rows - 1 - self.engine.running - self.engine.waiting):
            prefix = f"row {number % self.work.rows}"
            self.engine.submit(Request(prompt=self.work.prompts()[number], prefix=prefix, max_new_tokens=self.work.new))
        self.engine.step()


def measure(case: str, work: Work, effort: Effort, tell: Tell) -> list[Row]:
    """Into the table against the bar and against loading again; and the pass that uses it first."""
    _refuse_unswapped(case, work)
    one = _Swapping(work)
    turns = (one.from_memory, one.from_file, one.reload, one.admitting, one.admitting_known)
    for turn in turns:
        turn(0)
    tell(f"{case}: {one.file.stat().st_size / 2**20:.1f} MiB a prefix")
    found = alternate({turn.__name__: turn for turn in turns}, effort.rounds)
    bar = [BAR] * effort.rounds
    return [
        row(case, "milliseconds, memory to table", found["from_memory"], bar, "the bar"),
        row(case, "milliseconds, memory to table", found["from_memory"], found["reload"], "loading the session anew"),
        row(case, "milliseconds, file to table", found["from_file"], bar, "the bar"),
        row(
            case, "milliseconds, a pass that admits", found["admitting"], found["admitting_known"], "behind a known one"
        ),
    ]


def _refuse_unswapped(case: str, work: Work) -> None:
    """Raise UnequalError unless the next text is behind the new prefix, and it is the one that was put there."""
    ours, prompt = OurEngine(work), work.prompts()[:1]
    texts = [written(ours.engine, prompt, [name], work.new).tokens for name in ("row 0", "row 1")]
    ours.session.add_prefix("row 0", ours.prefixes[1])
    if not written(ours.engine, prompt, ["row 0"], work.new).tokens == texts[1] != texts[0]:
        raise UnequalError(f"{case}: a prefix that was replaced is still in use")
