"""One step of several runs in the same passes of their backbone: each with its own prefix, batch, loss and optimizer.

Nothing mixes: a row sees the prefix of its own run, and a run's gradient comes from its own rows. What is shared is the
work of the frozen weights, which is most of it, and rows of like length are computed together whosever they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.attention import uses_registry
from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import IGNORED, Batch, Collate
from prefixkit.injections import KeyValuePrefix, TaskHead, part_of
from prefixkit.methods.autoprompt import AutoPrompt
from prefixkit.methods.with_head import WithHead
from prefixkit.training import heads_side_by_side, layout, loop
from prefixkit.training.checkpoint import State
from prefixkit.training.objectives import exact, next_token
from prefixkit.training.preparation import Prepared
from prefixkit.training.progress import Step

PASS = 256
"""What a pass costs by itself, in tokens: rows are padded to stand together for as much."""
MOST = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Tokens of a pass, by device: more are no faster, and take memory."""


@dataclass
class Run:
    """One of several runs: what was prepared, and where it stands."""

    prepared: Prepared
    optimizer: torch.optim.Optimizer
    state: State


class Trained(NamedTuple):
    """What a run trains, as its rows receive it."""

    prefix: KeyValuePrefix
    head: TaskHead | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        behind = () if self.head is None else (self.head.weight, self.head.bias)
        return (*self.prefix.keys, *self.prefix.values, *behind)


Rows = list[tuple[int, Any]]
"""Encoded examples, each with the place of its run."""


def can_share(prepared: Prepared) -> bool:
    """Whether rows of this run can be computed beside those of others.

    That takes keys and values before text, for words that it learns or for a head that gives labels or tags.
    """
    backbone, task = prepared.backbone, prepared.task
    if backbone.paired or not uses_registry(backbone.model) or isinstance(prepared.method, AutoPrompt):
        return False
    known = prepared.objective is next_token if task.answer is None else task.answer in heads_side_by_side.ANSWERS
    return known and task.image is None and layout.is_prefix(backbone.fold(prepared.method()))


def step(runs: Sequence[Run]) -> list[Step]:
    """One optimizer step of every run, each with the batch that is its own turn's.

    Args:
        runs: of one backbone, each of which `can_share`; those with heads of one kind share passes.
    """
    done: dict[int, Step] = {}
    for kind in dict.fromkeys(map(_kind, runs)):
        places = [place for place, run in enumerate(runs) if _kind(run) == kind]
        done.update(zip(places, _step([runs[place] for place in places]), strict=True))
    return [done[place] for place in range(len(runs))]


def _kind(run: Run) -> tuple[str | None, str, int] | None:
    """What a run answers, what its head reads and how large it is; None without a head."""
    method = run.prepared.method
    return (run.prepared.task.answer, method.reads, len(method.head_bias)) if isinstance(method, WithHead) else None


def _step(runs: Sequence[Run]) -> list[Step]:
    backbone, collate = runs[0].prepared.backbone, runs[0].prepared.batches.collate
    batches = [_examples(run) for run in runs]
    made = [received(run.prepared) for run in runs]
    leaves = [_leaf(one) for one in made]
    shares = torch.tensor([_share(run, own) for run, own in zip(runs, batches, strict=True)], dtype=torch.float64)
    sums = torch.zeros(len(runs), dtype=torch.float64)
    rows = [(index, example) for index, own in enumerate(batches) for example in own]
    passes = in_turn if layout.packs(collate) else alike
    for together in passes(rows, most_tokens(backbone)):
        sums += _backward(backbone, collate, together, leaves, shares)
    _through(made, leaves)
    return [_update(run, own, float(total)) for run, own, total in zip(runs, batches, sums, strict=True)]


def most_tokens(backbone: Backbone) -> int:
    """How many tokens the rows of a pass have at most, unless it is a single row."""
    return MOST.get(backbone.device.type, MOST["cpu"])


def alike(rows: Rows, most: int) -> Iterator[Rows]:
    """`rows` in groups of like length, shortest first, of at most `most` tokens (but at least a row).

    None pads its rows by more than another pass would cost.
    """
    group: Rows = []
    padding = 0
    for row in sorted(rows, key=lambda row: len(row[1])):
        padding += (len(row[1]) - len(group[-1][1])) * len(group) if group else 0
        if group and (padding > PASS or (len(group) + 1) * len(row[1]) > most):
            yield group
            group, padding = [], 0
        group.append(row)
    yield group


def in_turn(rows: Rows, most: int) -> Iterator[Rows]:
    """`rows` in groups in their order, of at most `most` tokens (but at least a row): what is packed need not match."""
    group: Rows = []
    tokens = 0
    for row in rows:
        if group and tokens + len(row[1]) > most:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += len(row[1])
    yield group


def _backward(backbone: Backbone, collate: Collate, rows: Rows, leaves: Sequence[Trained], shares: Tensor) -> Tensor:
    """Add the gradients of `rows` to `leaves`; gives each run's summed loss, in nats."""
    made = collate([example for _, example in rows])
    owner = torch.tensor([index for index, _ in rows], device=backbone.device)
    prefixes, heads = [leaf.prefix for leaf in leaves], [leaf.head for leaf in leaves if leaf.head is not None]
    if heads:
        return heads_side_by_side.backward(backbone, made, owner, prefixes, heads, shares)
    return _backward_words(backbone, made.to(backbone.device), owner, prefixes, shares)


def _backward_words(
    backbone: Backbone, batch: Batch, owner: Tensor, prefixes: Sequence[KeyValuePrefix], shares: Tensor
) -> Tensor:
    learnt = batch.labels != IGNORED
    wanted, owners = batch.labels[learnt], layout.owners(batch, owner)[learnt]
    weights = shares.to(backbone.device)[owners]
    sums = torch.zeros(len(shares), dtype=torch.float64, device=backbone.device)

    def loss_of(logits: Tensor, part: slice) -> Tensor:
        each = F.cross_entropy(exact(logits), wanted[part], reduction="none")
        sums.index_add_(0, owners[part], each.detach().double())
        return (each * weights[part].to(each.dtype)).sum()

    with backbone.targets(
        batch.input_ids, batch.attention_mask, batch.labels, layout.laid_several(batch, prefixes, owner)
    ) as targets:
        targets.summed(loss_of).backward()  # type: ignore[no-untyped-call]
    return sums.cpu()


def received(prepared: Prepared) -> Trained:
    """What the rows of a run receive, which `can_share`; its method's gradients go through it."""
    made = prepared.backbone.fold(prepared.method())
    prefix = part_of(made, KeyValuePrefix)
    assert prefix is not None
    return Trained(prefix, part_of(made, TaskHead))


def _leaf(made: Trained) -> Trained:
    """A copy where the gradients of several passes gather, before they go on once."""
    prefix, head = made
    keys, values = (tuple(map(_apart, each)) for each in (prefix.keys, prefix.values))
    copied = None if head is None else replace(head, weight=_apart(head.weight), bias=_apart(head.bias))
    return Trained(replace(prefix, keys=keys, values=values), copied)


def _apart(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().contiguous().requires_grad_()
    # Of its own: what a pass leaves may lie in a CUDA graph's memory, which the next pass writes again.
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def _through(made: Sequence[Trained], leaves: Sequence[Trained]) -> None:
    """Send the gradients at `leaves` on into what made them."""
    pairs = [
        (tensor, leaf.grad)
        for one, copy in zip(made, leaves, strict=True)
        for tensor, leaf in zip(one.tensors, copy.tensors, strict=True)
        if tensor.requires_grad
    ]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _examples(run: Run) -> list[Any]:
    """The batch that is its turn's, before it is collated with those of others."""
    batches = run.prepared.batches
    return [batches.examples[index] for index in batches.indices(run.state.step)]


def _share(run: Run, examples: Sequence[Any]) -> float:
    """What a token's loss counts in its run."""
    return 1 / (len(examples) if run.prepared.config.optimizer.loss == "sum" else _targets(examples))


def _targets(examples: Sequence[Any]) -> int:
    return sum(example.target_tokens for example in examples)


def _update(run: Run, examples: Sequence[Any], total: float) -> Step:
    prepared, state = run.prepared, run.state
    loop.set_rates(run.optimizer, loop.schedule(state.step, prepared))
    loop.update(prepared, run.optimizer, state.step)
    state.last_loss = total / _targets(examples)
    state.step += 1
    return Step(step=state.step, total=prepared.total_steps, loss=state.last_loss, tokens=sum(map(len, examples)))
