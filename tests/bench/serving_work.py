"""What a serving case gives every contender: exported folders, prompts, prefixes, and how much is to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit.format import names
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, Manifest, Positions, Provenance, TaskRecord
from prefixkit.prefix import Prefix
from prefixkit.serving.report import read_report

Tokens = tuple[int, ...]

# Nothing ends an answer, so that all write equally much.
TASK = TaskRecord(
    name="bench",
    input_template="{input}",
    separator="",
    target_template="{target}",
    bos="none",
    stop=(),
    max_length=2**31,
)


class UnequalError(RuntimeError):
    """Contenders that do not the same work, so that there is nothing to compare; in one line."""


@dataclass(frozen=True)
class Work:
    """What is the same for every contender; JSON carries it into a process of its own. It needs no PyTorch.

    Attributes:
        backbone: a folder of transformers.
        buffered, portable: the same, exported for buffers and as one portable graph; the latter may be "".
        rows: texts at once.
        length: slots of a prefix.
        prompt: tokens of a prompt.
        new: tokens to write for each.
    """

    backbone: str
    buffered: str
    portable: str
    rows: int
    length: int
    prompt: int
    new: int
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    seed: int = 0

    @property
    def capacity(self) -> int:
        """Slots of a row that holds prefix, prompt and answer."""
        return self.length + self.prompt + self.new

    @property
    def numpy(self) -> Any:
        """The dtype of prefixes."""
        return ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @cached_property
    def identity(self) -> BackboneIdentity:
        """The backbone, as its export knows it."""
        return read_report(self.buffered).backbone

    def prompts(self, tokens: int | None = None) -> list[Tokens]:
        """A prompt for each row, of `tokens` or of the case's own number, random."""
        draw, shape = np.random.default_rng(self.seed), (self.rows, tokens or self.prompt)
        return [tuple(row) for row in draw.integers(1, self.identity.vocab_size, shape).tolist()]

    @cached_property
    def prefixes(self) -> list[Prefix]:
        """A prefix for each row, of random numbers; drawn once, as there may be gigabytes of them."""
        draw, layers = np.random.default_rng(self.seed + 1), self.identity.stacks["decoder"]
        sizes = [(layer.kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
        base = [draw.standard_normal((heads, self.length, dim), np.float32).astype(self.numpy) for heads, dim in sizes]
        return [prefix_of(self.identity, [_rolled(each, row) for each in base]) for row in range(self.rows)]


def prefix_of(identity: BackboneIdentity, tensors: list[Any]) -> Prefix:
    """Key and value of each layer, [kv_heads, length, head_dim], as a prefix that states `TASK`."""
    length = tensors[0].shape[1]
    record = InjectionRecord(
        kind="key_value_prefix",
        stack="decoder",
        attention="self",
        length=length,
        positions=Positions(text_start=length),
        frozen_slots=0,
    )
    makers = (names.key, names.value)
    stored = {makers[at % 2]("decoder", "self", at // 2): tensor for at, tensor in enumerate(tensors)}
    provenance = Provenance(method="random", prefixkit="0")
    return Prefix(Manifest(backbone=identity, injections=(record,), provenance=provenance, task=TASK), stored)


def _rolled(tensor: Any, row: int) -> Any:
    # Drawing gigabytes takes minutes. Slots must not be what moves: attention does not see their order.
    return np.ascontiguousarray(np.roll(tensor, row, axis=-1))


@dataclass(frozen=True)
class Turn:
    """What a contender wrote, and when.

    Attributes:
        first: seconds to the first token of every row.
        total: seconds to the last.
        tokens: of each row.
    """

    first: float
    total: float
    tokens: list[list[int]]

    @property
    def per_token(self) -> float:
        """Milliseconds a token in decoding: what comes behind the first."""
        return 1000 * (self.total - self.first) / (len(self.tokens[0]) - 1)

    @property
    def rate(self) -> float:
        """Tokens a second of all rows, from the prompt to the last one."""
        return sum(map(len, self.tokens)) / self.total


@dataclass(frozen=True)
class Effort:
    """How much is measured, and with what.

    Attributes:
        rounds: of every contender in turn.
        alone: processes for memory, a contender; 0 leaves memory out.
        genai: a Python interpreter that has onnxruntime-genai.
    """

    rounds: int
    alone: int
    genai: str | None = None


Tell = Callable[[str], None]
