"""An exported decoder that writes into buffers: prefixes are placed, prompts read and tokens written row by row.

Rows are independent: each has a prefix of its own, or none, and stands at a place of its own. Some may also share one,
which they read where it is, and which takes none of their slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from prefixkit.errors import ConfigError
from prefixkit.serving.bound_pass import Next, Pass
from prefixkit.serving.buffer_names import INPUTS, SHARED_LENGTH, shared_names
from prefixkit.serving.buffers import Buffers
from prefixkit.serving.cache_scales import read_scales
from prefixkit.serving.graph import Device, Graph, cache_shapes, padded
from prefixkit.serving.graph_files import check_files
from prefixkit.serving.prefix_table import ServedPrefix
from prefixkit.serving.report import ExportedFolder
from prefixkit.serving.shared_prefix import SharedPrefix


class BufferedRuntime:
    """The graphs of an exported folder, each loaded once, when it is needed; `rows` gives places to write in.

    Attributes:
        device: `cuda` or `cpu`, as onnxruntime chose after it tried.
        dtype: of what is computed, and of keys and values that are given.
        scales: of those that are kept, in eight bits; None where they are kept in `dtype`.
    """

    def __init__(self, folder: ExportedFolder, *, device: Device = "auto", threads: int | None = None) -> None:
        assert folder.buffered is not None
        self._folder, self._files, self._threads = folder, folder.buffered, threads
        self.layers, self.dtype = folder.backbone.stacks["decoder"], np.dtype(folder.dtype)
        check_files(folder.folder, folder.files)
        scales = self._files.scales
        self.scales = None if scales is None else read_scales(folder.folder / scales, self.layers)
        self._asked = _suited(folder, device)
        self.places = self._graph(self._files.place)
        self.device = self.places.device
        if folder.dtype == "bfloat16" and self.device == "cpu":
            step = "export with --dtype float32, or float16"
            raise ConfigError(str(folder.folder), expected="a GPU for bfloat16", found="none", next_step=step)

    def rows(self, count: int, capacity: int, *, whole: bool = False, sharing: bool = False) -> Rows:
        """Places for `count` texts of at most `capacity` slots each, prefixes included.

        Args:
            whole: they stay for long. On a GPU each pass of tokens is then over all of them, and recorded.
            sharing: some of them may share a prefix, which is not in their slots.

        Raises:
            ConfigError: more than there is memory for, or a folder without a graph for sharing.
        """
        whole, graph = whole and self.device == "cuda", self.sharing if sharing else self.prompts
        buffers = self._buffers(count, capacity)
        kept = SharedPrefix(self.places, partial(self._buffers, 1)) if sharing else None
        tokens = graph if sharing else self.recorded(count, capacity) if whole else self.tokens
        return Rows(self, buffers, tokens, whole=whole, shared=kept)

    def recorded(self, rows: int, capacity: int, shared: int | None = None) -> Graph:
        """The graph of tokens for passes of one size, also of the prefix that is `shared`."""
        fixed = {"rows": rows, "capacity": capacity, "sequence_length": 1}
        if shared is None:
            return self._graph(self._files.decode, fixed=fixed)
        return self._graph(self._file_of_sharing, fixed={**fixed, "prefix_length": shared})

    @cached_property
    def prompts(self) -> Graph:
        """The graph that takes any number of tokens a row."""
        # One copy of the weights is enough on a CPU: that of the graph which runs most.
        return self._checked(self._graph(self._folder.graph, mapped=True))

    @cached_property
    def tokens(self) -> Graph:
        """The graph that takes one token a row, or any number of tokens of a single row."""
        return self._checked(self._graph(self._files.decode))

    @cached_property
    def sharing(self) -> Graph:
        """The graph that takes any number of tokens a row, and a prefix beside their buffers.

        Raises:
            ConfigError: a folder of before there was one.
        """
        graph, caches = self._graph(self._file_of_sharing), cache_shapes(INPUTS, "past", self.layers)
        names = shared_names(len(self.layers))
        return self._checked(graph, dict(zip(names, caches.values(), strict=True)))

    @property
    def _file_of_sharing(self) -> str:
        if self._files.shared is None:
            expected, found = "a graph whose rows can share a prefix", "an export without one"
            raise ConfigError(str(self._folder.folder), expected=expected, found=found, next_step="export again")
        return self._files.shared

    def _graph(self, file: str, **options: Any) -> Graph:
        return Graph(self._folder.folder / file, self._asked, self._threads, **options)

    def _checked(self, graph: Graph, others: Mapping[str, tuple[int, int]] | None = None) -> Graph:
        plain = [*(name for name in INPUTS.values() if "%d" not in name), SHARED_LENGTH]
        graph.check({**cache_shapes(INPUTS, "past", self.layers), **(others or {})}, plain, self._kept)
        return graph

    def _buffers(self, rows: int, capacity: int) -> Buffers:
        return Buffers(self.layers, rows, capacity, self._kept, self.device, self.scales)

    @property
    def _kept(self) -> str:
        return str(self.dtype) if self.scales is None else "int8"


def _suited(folder: ExportedFolder, device: Device) -> Device:
    """Where to run `folder`: in float32 on the CPU, as GroupQueryAttention has no such kernel on a GPU."""
    if folder.dtype != "float32" or device not in ("auto", "cuda"):
        return device
    if device == "cuda":
        expected, step = "float16 or bfloat16 on a GPU", "export again with --dtype bfloat16, or use --device cpu"
        raise ConfigError(str(folder.folder), expected=expected, found="float32", next_step=step)
    return "cpu"


class Rows:
    """Texts in progress.

    Attributes:
        count, capacity: how many there are, and how many slots each has.
        whole: whether a pass of one token is over all of them.
        write_index: [rows], the slot of each row's next token.
        positions: [rows], its position id.
        seen: [rows], how many slots of the shared prefix stand before its own.
    """

    def __init__(
        self,
        runtime: BufferedRuntime,
        buffers: Buffers,
        tokens: Graph,
        *,
        whole: bool,
        shared: SharedPrefix | None = None,
    ) -> None:
        self.runtime, self.buffers, self.whole, self.shared = runtime, buffers, whole, shared
        self.count, self.capacity = buffers.rows, buffers.capacity
        self.write_index, self.positions = np.zeros(buffers.rows, np.int64), np.zeros(buffers.rows, np.int64)
        self.seen = np.zeros(buffers.rows, np.int64)
        self._ready: WeakKeyDictionary[ServedPrefix, list[Any]] = WeakKeyDictionary()
        self._tokens = tokens
        self._passes: dict[tuple[int, int], Pass] = {}
        self._newest: Pass | None = None

    def begin(self, row: int, prefix: ServedPrefix | None, *, shared: bool = False) -> None:
        """Give `row` a new text behind `prefix`; what was there is forgotten.

        Args:
            shared: read the prefix where it is kept for all rows, none of which may be reading another there.
        """
        self.write_index[row], self.positions[row] = (prefix.length, prefix.text_start) if prefix else (0, 0)
        self.seen[row] = 0
        if prefix is not None and shared:
            self.write_index[row], self.seen[row] = 0, prefix.length
            self._keep(prefix)
        elif prefix is not None and prefix.length:
            if prefix not in self._ready:
                self._ready[prefix] = self.buffers.on_device(prefix)
            self.buffers.place(self.runtime.places, row, self._ready[prefix])

    def read(self, first: int, texts: Sequence[Sequence[int]]) -> Next:
        """Append the tokens of `texts` to the rows from `first` on, in one pass. A row without any stays as it is.

        Raises:
            ConfigError: the longest text, which the others are padded to, does not fit behind each row's own.
        """
        rows, longest = slice(first, first + len(texts)), max(map(len, texts))
        ids, real = padded(texts, left=False)
        counts = real.sum(-1)
        # What is written to a row that stays lies behind its text, or in a row that nobody has.
        room = self.capacity - longest
        index = np.where(counts, self.write_index[rows], np.minimum(self.write_index[rows], room))
        if int(index.max()) > room:
            expected = f"texts that end within the capacity of {self.capacity} slots"
            raise ConfigError("capacity", expected=expected, found=f"{int(index.max()) + longest}")
        last = np.maximum(counts - 1, 0)
        positions = self.positions[rows, None] + np.minimum(np.arange(longest), last[:, None])
        given = {
            INPUTS["input_ids"]: ids,
            INPUTS["position_ids"]: positions,
            INPUTS["write_index"]: index,
            INPUTS["last"]: last,
            SHARED_LENGTH: self.seen[rows],
        }
        found = self._pass(rows, longest).run(given)
        self.write_index[rows] += counts
        self.positions[rows] += counts
        return found

    def _keep(self, prefix: ServedPrefix) -> None:
        assert self.shared is not None
        if self.shared.keep(prefix):
            # What was bound, or recorded, reads where it was before.
            self._passes.clear()
            self._newest = None
            if self.whole:
                self._tokens = self.runtime.recorded(self.count, self.capacity, self.shared.buffers.capacity)

    def _pass(self, rows: slice, longest: int) -> Pass:
        """The work on so many tokens of `rows`, which for single tokens is kept."""
        begin, end = key = rows.start, rows.stop
        if longest > 1 or (self.whole and key != (0, self.count)):
            # The graph of tokens looks at the used slots alone, but reads one prompt at a time.
            alone = end - begin == 1 and not self.whole
            prompts = self.runtime.prompts if self.shared is None else self.runtime.sharing
            return self._reading(self._tokens if alone else prompts, rows, longest)
        if key not in self._passes:
            self._passes[key] = Pass(self._tokens, self.buffers, rows, longest, self.shared)
        return self._passes[key]

    def _reading(self, graph: Graph, rows: slice, longest: int) -> Pass:
        """A pass over prompts. The last one is kept: the same rows may read more, and binding takes long."""
        if self._newest is None or (self._newest.graph, self._newest.rows) != (graph, rows):
            self._newest = Pass(graph, self.buffers, rows, longest, self.shared)
        self._newest.take(longest)
        return self._newest
