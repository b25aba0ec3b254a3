"""Our ways to serve: the engine over buffers, the same with one graph for all passes, and the portable graph.

Nothing here imports PyTorch, as nothing in serving does: memory is compared process by process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefixkit.prefix import Prefix
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.engine import Engine
from prefixkit.serving.graph import Graph
from prefixkit.serving.request import Progress, Request
from prefixkit.serving.session import Session
from tests.bench.serving_work import Tokens, Turn, Work


class OurEngine:
    """`Engine`: prompts through the graph of any number of tokens, tokens through the one that reads one a row.

    Args:
        prefixes: for rows in turn; None is one for each.
        shared: keep the first once for all rows.
    """

    def __init__(self, work: Work, prefixes: Sequence[Prefix] | None = None, *, shared: bool = False) -> None:
        self.work, self.prefixes, self.shared = work, prefixes or work.prefixes, shared
        self.session = Session(work.buffered, device=work.device, threads=work.threads)  # type: ignore[arg-type]
        self.names: list[str | None] = [f"row {row % len(self.prefixes)}" for row in range(work.rows)]
        for row, prefix in enumerate(self.prefixes):
            self.session.add_prefix(f"row {row}", prefix)
        self.begin()

    def begin(self) -> None:
        """Make room for all rows."""
        rows, capacity = self.work.rows, self.work.capacity - (self.work.length if self.shared else 0)
        name = "row 0" if self.shared else None
        self.engine = Engine(self.session, rows=rows, capacity=capacity, waiting=rows, shared=name)

    def write(self, prompts: Sequence[Tokens] | None = None, *, behind: bool = True) -> Turn:
        """Every row once. The prefix of the first one is new each time; without `behind` there is none."""
        prompts, began = prompts or self.work.prompts(), time.perf_counter()
        if behind:
            self.session.add_prefix("row 0", self.prefixes[0])
        return written(self.engine, prompts, self.names if behind else [None] * len(prompts), self.work.new, began)


class OurScatteredEngine(OurEngine):
    """The same with the opset-24 graph for tokens as well: one graph for everything."""

    def begin(self) -> None:
        """Exchange the graph for tokens."""
        runtime, report, work = self.session.runtime, self.session.report, self.work
        assert isinstance(runtime, BufferedRuntime)
        sizes = {"rows": work.rows, "capacity": work.capacity, "sequence_length": 1}
        fixed = sizes if runtime.device == "cuda" else None
        graph = Graph(report.folder / report.graph, runtime.device, work.threads, fixed=fixed)  # type: ignore[arg-type]
        runtime.tokens = graph
        runtime.recorded = lambda rows, capacity: graph  # type: ignore[method-assign]
        super().begin()


class OurPortable:
    """`Session.generate` on the portable graph, whose cache grows."""

    def __init__(self, work: Work) -> None:
        self.work, self.prefixes = work, work.prefixes
        self.session = Session(work.portable, device=work.device, threads=work.threads)  # type: ignore[arg-type]
        for row, prefix in enumerate(self.prefixes):
            self.session.add_prefix(f"row {row}", prefix)

    def write(self, prompts: Sequence[Tokens] | None = None, *, behind: bool = True) -> Turn:
        """As `OurEngine.write`."""
        prompts, began, waiting = prompts or self.work.prompts(), time.perf_counter(), set(range(self.work.rows))
        if behind:
            self.session.add_prefix("row 0", self.prefixes[0])
        names = [f"row {row}" if behind else None for row in range(self.work.rows)]
        first, found = 0.0, {}
        for piece in self.session.stream(prompts, names, max_new_tokens=self.work.new):  # type: ignore[arg-type]
            if waiting:
                waiting.discard(piece.row)
                first = time.perf_counter() - began
            if piece.completion is not None:
                found[piece.row] = list(piece.completion.token_ids)
        return Turn(first, time.perf_counter() - began, [found[row] for row in range(self.work.rows)])


def written(
    engine: Engine, prompts: Sequence[Tokens], prefixes: Sequence[str | None], new: int, began: float | None = None
) -> Turn:
    """What an idle engine writes for `prompts` behind the prefixes of those names."""
    began = began or time.perf_counter()
    pairs = zip(prompts, prefixes, strict=True)
    numbers = [engine.submit(Request(prompt=ids, prefix=name, max_new_tokens=new)) for ids, name in pairs]
    seen: dict[int, Progress] = {}
    first = 0.0
    while not engine.idle:
        seen.update((progress.number, progress) for progress in engine.step())
        if not first and len(seen) == len(numbers):
            first = time.perf_counter() - began
    total, done = time.perf_counter() - began, [seen[number].completion for number in numbers]
    return Turn(first, total, [list(one.token_ids) for one in done if one is not None])
