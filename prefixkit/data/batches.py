"""Encoded examples in padded batches. The batch of a step is a pure function of the data, the seed and the step.

Notation: B batch, T tokens of the longest example in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from prefixkit.data.readers import Example
from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import ModelTokenizer, encode_target, fit_prompt

IGNORED = -100
"""The label of a token that is not to be learned, as torch's cross entropy has it."""
POOL = 64
"""Batches' worth of random examples that are sorted by length together: more would pad less and mix less."""

NEAR = 4
"""Tokens within which lengths count as one where texts are sorted by their beginnings."""

Side = Literal["left", "right"]
Order = Literal["random", "length", "beginnings"]
"""Which examples come together: any, as packed rows want it (of like length, few to compile for, none far above the
mean); those of similar length, as padded rows do; or among these such as begin alike, where that is computed once."""
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example; only those of `target` are learned."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    truncated: int = 0
    """Tokens that the input lost to fit."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def words(self) -> list[int]:
        """All its tokens."""
        return [*self.prompt, *self.target]

    @property
    def target_tokens(self) -> int:
        """Tokens that are learned."""
        return len(self.target)


@dataclass(frozen=True)
class Batch:
    """int64 tensors, [B, T] each. `labels` stand at their own token: the model's loss shifts them by one."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on `device`, where a backbone reads it."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    @property
    def target_tokens(self) -> int:
        """Tokens that are learned."""
        return int((self.labels != IGNORED).sum())

    @property
    def examples(self) -> int:
        """Rows."""
        return len(self.labels)


class PairedBatch(Batch):
    """Prompts and targets apart: `labels` [B, S] are the targets, of a length of their own."""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding, of prompts and targets."""
        return super().tokens + self.target_tokens


def encode_examples(task: TaskRecord, tokenizer: ModelTokenizer, examples: Iterable[Example]) -> list[EncodedExample]:
    """Each example as the task says. Raises DataError, at the example's line, where one cannot be made to fit."""
    return [_encoded(task, tokenizer, example) for example in examples]


def _encoded(task: TaskRecord, tokenizer: ModelTokenizer, example: Example) -> EncodedExample:
    target = encode_target(task, tokenizer, example.target, where=example.where)
    prompt, lost = fit_prompt(task, tokenizer, example.fields, room=len(target), where=example.where)
    if not prompt or not target:
        raise DataError(example.where, expected="a prompt and a target of a token or more", found="an empty one")
    return EncodedExample(tuple(prompt), tuple(target), lost)


def count_truncated(examples: Iterable[Encoded]) -> int:
    """How many of `examples` lost a part of their input."""
    return sum(example.truncated > 0 for example in examples)


def collate(examples: Sequence[EncodedExample], *, pad_id: int = 0, side: Side = "right") -> Batch:
    """One batch of `examples` in order, padded on `side`. Any id of the vocabulary serves as `pad_id`: it is masked."""
    shape = (len(examples), max(map(len, examples)))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        start = shape[1] - len(example) if side == "left" else 0
        middle, end = start + len(example.prompt), start + len(example)
        input_ids[row, start:end] = example.prompt + example.target
        attention_mask[row, start:end] = 1
        labels[row, middle:end] = example.target
    return Batch(*map(torch.from_numpy, (input_ids, attention_mask, labels)))


def collate_pairs(examples: Sequence[EncodedExample], *, pad_id: int = 0) -> PairedBatch:
    """One batch of `examples` in order for a model that reads prompts and targets apart, both padded on the right."""
    input_ids, attention_mask = rectangle([example.prompt for example in examples], pad_id)
    labels, _ = rectangle([example.target for example in examples], IGNORED)
    return PairedBatch(input_ids, attention_mask, labels)


def rectangle(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` in one tensor [B, T], filled up on the right, and where they are."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tensor = torch.full(mask.shape, filler, dtype=torch.int64)
    tensor[mask] = torch.tensor([token for row in rows for token in row])
    return tensor, mask.long()


class Encoded(Protocol):
    """An example as numbers, of whatever task."""

    def __len__(self) -> int: ...

    @property
    def truncated(self) -> int:
        """Tokens that the input lost to fit."""
        ...


Collate = Callable[[Sequence[Any]], Any]
"""What makes one batch of encoded examples in order."""


def in_order(examples: Sequence[Encoded], *, batch_size: int, collate: Collate = collate) -> Iterator[Any]:
    """Every example once, by length, for a loss that does not depend on the order."""
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size])


class TrainingBatches:
    """Batches in random order, every example exactly once an epoch; by default each of examples of similar length.

    Steps count from 0 through all epochs, so a step is all the state there is: a resumed run goes on with
    `batch(step)`. The last batch that an epoch forms may be smaller than `batch_size`.

    Attributes:
        order: which examples come together; for "beginnings" they must have `words`.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        batch_size: int,
        seed: int,
        collate: Collate = collate,
        order: Order = "length",
    ) -> None:
        if batch_size < 1:
            raise ConfigError("--batch-size", expected="1 or more", found=str(batch_size))
        if seed < 0:
            raise ConfigError("--seed", expected="0 or more", found=str(seed))
        if not examples:
            raise DataError("training data", expected="at least one example", found="none")
        self.examples, self.batch_size, self.seed, self.collate = examples, batch_size, seed, collate
        self.order = order
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self._lengths = np.array([len(example) for example in examples])
        self._epoch = lru_cache(maxsize=2)(self._plan)

    def batch(self, step: int) -> Any:
        """The batch of `step`."""
        return self.collate([self.examples[i] for i in self.indices(step)])

    def indices(self, step: int) -> list[int]:
        """Which examples the batch of `step` holds."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch, self.order)[position]

    @cached_property
    def _by_text(self) -> Numbers:
        """The place of each example among all of them in the order of their texts."""
        examples: Sequence[Any] = self.examples
        return np.argsort(sorted(range(len(examples)), key=lambda index: tuple(examples[index].words)))

    def _sorted(self, pool: Numbers, order: Order, random: np.random.Generator) -> Numbers:
        lengths = self._lengths[pool]
        if order == "random":
            return pool
        if order == "length":
            return pool[np.argsort(lengths, kind="stable")]
        # Other limits each time, so that few examples do not make the same batches in every epoch.
        return pool[np.lexsort((self._by_text[pool], (lengths + random.integers(NEAR)) // NEAR))]

    def _plan(self, epoch: int, order: Order) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.examples))
        size = self.batch_size * POOL
        batches: list[list[int]] = []
        for pool in (shuffled[start : start + size] for start in range(0, len(shuffled), size)):
            chosen = self._sorted(pool, order, random).tolist()
            batches += [chosen[start : start + self.batch_size] for start in range(0, len(pool), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))]
