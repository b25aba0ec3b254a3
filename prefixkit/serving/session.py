"""A served folder: one model in onnxruntime, any number of prefixes, batches of prompts with a prefix each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from prefixkit.errors import ConfigError, MismatchError
from prefixkit.format.digest import tokenizer_hash
from prefixkit.format.manifest import Manifest, TaskRecord
from prefixkit.prefix import Prefix, load, matches
from prefixkit.serving.batching import write_in_buffers
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.generation import Completion, Piece, Prompt
from prefixkit.serving.one_batch import write
from prefixkit.serving.pair_prefix import ServedPrefixes, served_prefixes
from prefixkit.serving.pair_runtime import PairRuntime
from prefixkit.serving.prefix_table import ServedPrefix, served
from prefixkit.serving.prompts import (
    UNBOUNDED,
    baked_start,
    encode,
    new_tokens,
    plain_text,
    refuse_unknown,
    room_behind_source,
    room_for,
)
from prefixkit.serving.report import read_report
from prefixkit.serving.runtime import Device, Runtime
from prefixkit.serving.sampling import GREEDY, Sampling
from prefixkit.spelling import did_you_mean
from prefixkit.task import Fields, ModelTokenizer, load_tokenizer, spelled_ids

OWN = "own"
"""The name of the prefix that came with the folder."""


class Session:
    """An exported folder, ready to generate.

        session = Session("served")
        session.add_prefix("other", "other.safetensors")
        session.generate(["name : Blue Spice", "name : The Eagle"], prefix=["own", "other"])

    Attributes:
        device: `cuda` or `cpu`, as onnxruntime chose.
        prefixes: those that prompts may name, by name.
    """

    def __init__(self, folder: str | Path, *, device: Device = "auto", threads: int | None = None) -> None:
        """Load the graph in `folder` and the prefix beside it.

        Args:
            device: `auto` takes the GPU if onnxruntime can use it.
            threads: of the CPU, for one operator; None leaves it to onnxruntime.

        Raises:
            InputError: no exported folder, a damaged one, one that writes no text, or a device that cannot be had.
        """
        self.report = read_report(folder)
        if self.report.reader is not None:
            step = "use prefixkit.serving.reader.Reader, which gives states and logits"
            raise ConfigError(str(folder), expected="a model that writes", found="one that reads", next_step=step)
        self._pair = self.report.encoder is not None
        runtime = PairRuntime if self._pair else Runtime if self.report.buffered is None else BufferedRuntime
        self.runtime: Runtime | PairRuntime | BufferedRuntime = runtime(self.report, device=device, threads=threads)
        self.device = self.runtime.device
        self.prefixes: dict[str, ServedPrefix | ServedPrefixes] = {}
        if self.report.prefix_file is not None:
            self.add_prefix(OWN, self.report.folder / self.report.prefix_file)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The tokenizer in the folder. Raises MismatchError for another one than was exported."""
        expected, found = self.report.backbone.tokenizer_hash, tokenizer_hash(self.report.folder)
        if expected is not None and found not in (expected, None):
            raise MismatchError(
                self.report.folder / "tokenizer.json",
                expected=f"the exported one, {expected}",
                found=found or "",
                next_step="export again with the tokenizer that you want",
            )
        return load_tokenizer(self.report.folder)

    def add_prefix(self, name: str, prefix: str | Path | Prefix, *, allow_mismatch: bool = False) -> None:
        """Make `prefix` available under `name`, without touching the model.

        Raises:
            MismatchError: it was made for another backbone; `allow_mismatch` takes another tokenizer or other
                weights of equal shapes.
            InputError: a damaged file, or a folder whose one prefix is inside its graph.
        """
        if self.report.baked:
            step = "export without --baked"
            raise ConfigError(
                str(self.report.folder), expected="a graph that takes prefixes", found="a baked one", next_step=step
            )
        loaded = prefix if isinstance(prefix, Prefix) else load(prefix)
        self.check(loaded.manifest, allow_mismatch=allow_mismatch)
        self.prefixes[name] = self._served(name, loaded)

    def check(self, manifest: Manifest, *, allow_mismatch: bool = False) -> None:
        """Raise MismatchError for a prefix that was made for another backbone, by what its file says of itself."""
        own = self.report.prefix is not None and manifest.content == self.report.prefix.content
        # The folder's own prefix was checked when it was exported.
        matches(Prefix(manifest, {}), self.report.backbone, allow_mismatch=allow_mismatch or own)

    def drop_prefix(self, name: str) -> None:
        """Forget a prefix; texts that are being written behind it go on. Raises ConfigError for an unknown one."""
        if self.prefixes.pop(name, None) is None:
            step = did_you_mean(name, list(self.prefixes))
            raise ConfigError("prefix", expected="the name of one", found=repr(name), next_step=step)

    def _served(self, name: str, prefix: Prefix) -> ServedPrefix | ServedPrefixes:
        if self._pair:
            return served_prefixes(prefix, self.runtime.dtype)
        made = served(prefix, self.runtime.dtype)
        if isinstance(self.runtime, BufferedRuntime) and self.runtime.scales is not None:
            self.runtime.scales.refuse_larger(f"prefix {name!r}", made.tensors)
        if not self.report.takes_positions and made.text_start != made.length:
            expected = f"a text that starts at {made.length}: the model counts its prefix"
            raise ConfigError(f"prefix {name!r}", expected=expected, found=f"one that starts at {made.text_start}")
        return made

    def generate(
        self,
        prompts: Sequence[str | Fields],
        prefix: str | Sequence[str | None] | None = OWN,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        on_piece: Callable[[Piece], None] = lambda piece: None,
    ) -> list[Completion]:
        """What the model writes for each prompt, all in one batch; see `stream`."""
        rows: dict[int, Completion] = {}
        for piece in self.stream(prompts, prefix, max_new_tokens=max_new_tokens, sampling=sampling):
            on_piece(piece)
            if piece.completion is not None:
                rows[piece.row] = piece.completion
        return [rows[row] for row in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str | Fields],
        prefix: str | Sequence[str | None] | None = OWN,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
    ) -> Iterator[Piece]:
        """The text of every row as it is written, in pieces of whole characters.

        Args:
            prompts: an input of the prefix's task each: its text, or its fields by name.
            prefix: the name of the prefix for all prompts or of one for each; None is the bare model. The folder's own
                is the default, which is the bare model where it has none.
            max_new_tokens: tokens to write, at most; None is 128, or fewer where the context ends.
            sampling: how tokens are chosen.

        Raises:
            InputError: an unknown prefix, a prompt that does not fit the task or leaves no room for an answer.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts", expected="a list of them", found="one string")
        prefixes = self._named(prefix, len(prompts))
        rows = [
            self._prompt(given, before, f"prompt {row}", max_new_tokens)
            for row, (given, before) in enumerate(zip(prompts, prefixes, strict=True), start=1)
        ]
        if isinstance(self.runtime, BufferedRuntime):
            return write_in_buffers(self.runtime, self.tokenizer, rows, sampling)
        return write(self.runtime, self.tokenizer, rows, sampling)

    def prompt(
        self,
        given: str | Fields | tuple[int, ...] | Prompt,
        name: str | None,
        where: str,
        max_new_tokens: int | None,
        most: int = UNBOUNDED,
    ) -> Prompt:
        """What a model is to read and write for one input of the task of the prefix `name`, or for token ids.

        One that was made before is given back. Other threads may change the prefixes meanwhile.

        Args:
            most: tokens that there is room for. A text that surely has more is refused before it is tokenised.

        Raises:
            InputError: an unknown prefix, a prompt that does not fit the task or leaves no room for an answer.
        """
        if isinstance(given, Prompt):
            return given
        return self._prompt(given, self._found(name), where, max_new_tokens, most)

    def _prompt(
        self,
        given: str | Fields | tuple[int, ...],
        prefix: ServedPrefix | ServedPrefixes | None,
        where: str,
        max_new_tokens: int | None,
        most: int = UNBOUNDED,
    ) -> Prompt:
        task = self._task(prefix)
        ids, stop = encode(task, self.tokenizer, given, where, min(most, self._context))
        refuse_unknown(ids, self.report.backbone.vocab_size, where)
        room = self._room(task, prefix, len(ids), max_new_tokens, where)
        return Prompt(
            ids=ids,
            prefix=prefix,
            stop=stop,
            max_new_tokens=new_tokens(max_new_tokens, room, where),
            silent=spelled_ids(task, self.tokenizer),
        )

    @property
    def _context(self) -> int:
        return self.report.backbone.context_length or UNBOUNDED

    def _room(
        self, task: TaskRecord, prefix: ServedPrefix | ServedPrefixes | None, tokens: int, asked: int | None, where: str
    ) -> int:
        length = self.report.backbone.context_length
        if self._pair:
            return room_behind_source(task, length, tokens, asked, where)
        start = prefix.text_start if prefix is not None else baked_start(self.report)
        return room_for(task, length - start if length is not None else None, tokens, asked, where)

    def _task(self, prefix: ServedPrefix | ServedPrefixes | None) -> TaskRecord:
        """The prefix's own usage contract, else that of the folder's prefix, else plain text."""
        exported = self.report.prefix.task if self.report.prefix is not None else None
        return (
            (prefix.task if prefix is not None else None) or exported or plain_text(self.tokenizer, paired=self._pair)
        )

    def _named(
        self, prefix: str | Sequence[str | None] | None, count: int
    ) -> list[ServedPrefix | ServedPrefixes | None]:
        names = [prefix] * count if prefix is None or isinstance(prefix, str) else list(prefix)
        if len(names) != count:
            raise ConfigError("prefix", expected=f"one, or one for each of {count} prompts", found=f"{len(names)}")
        return [self._found(name) for name in names]

    def _found(self, name: str | None) -> ServedPrefix | ServedPrefixes | None:
        if self.report.baked:
            if name != OWN:
                found = "a graph with its prefix inside"
                raise ConfigError(
                    "prefix", expected="a graph that takes prefixes", found=found, next_step="export without --baked"
                )
            return None
        prefix = self.prefixes.get(name) if name is not None else None
        if prefix is not None or name is None or name == OWN:
            return prefix
        raise ConfigError(
            "prefix", expected="the name of one", found=repr(name), next_step=did_you_mean(name, list(self.prefixes))
        )
