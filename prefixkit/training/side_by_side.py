"""One step of several runs in the same passes of their backbone: each with its own prefix, batch, loss and optimizer.

Nothing mixes: a row sees the prefix of its own run, and a run's gradient comes from its own rows. What is shared is the
work of the frozen weights, which is most of it, and rows of like length are computed together whosever they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.attention import uses_registry
from prefixkit.backbones.backbone import Backbone
from prefixkit.data.batches import IGNORED, Batch, Collate
from prefixkit.injections import KeyValuePrefix, part_of
from prefixkit.methods.autoprompt import AutoPrompt
from prefixkit.training import layout, loop
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


Rows = list[tuple[int, Any]]
"""Encoded examples, each with the place of its run."""


def can_share(prepared: Prepared) -> bool:
    """Whether rows of this run can be computed beside those of others: keys and values before text that it learns."""
    model = prepared.backbone.model
    if prepared.backbone.paired or prepared.objective is not next_token or not uses_registry(model):
        return False
    if isinstance(prepared.method, AutoPrompt):
        return False
    received = prepared.backbone.fold(prepared.method())
    return isinstance(received, KeyValuePrefix) and received.placement == "prepend"


def step(runs: Sequence[Run]) -> list[Step]:
    """One optimizer step of every run, each with the batch that is its own turn's.

    Args:
        runs: of one backbone, each of which `can_share`.
    """
    backbone, collate = runs[0].prepared.backbone, runs[0].prepared.batches.collate
    batches = [_examples(run) for run in runs]
    made = [_key_values(run.prepared) for run in runs]
    leaves = [_leaf(prefix) for prefix in made]
    shares = torch.tensor([_share(run, own) for run, own in zip(runs, batches, strict=True)], dtype=torch.float64)
    sums = torch.zeros(len(runs), dtype=torch.float64)
    rows = [(index, example) for index, own in enumerate(batches) for example in own]
    passes = in_turn if layout.packs(collate) else alike
    for together in passes(rows, MOST.get(backbone.device.type, MOST["cpu"])):
        sums += _backward(backbone, collate, together, leaves, shares)
    _through(made, leaves)
    return [_update(run, own, float(total)) for run, own, total in zip(runs, batches, sums, strict=True)]


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


def _backward(
    backbone: Backbone, collate: Collate, rows: Rows, leaves: Sequence[KeyValuePrefix], shares: Tensor
) -> Tensor:
    """Add the gradients of `rows` to `leaves`; gives each run's summed loss, in nats."""
    batch: Batch = collate([example for _, example in rows]).to(backbone.device)
    owner = torch.tensor([index for index, _ in rows], device=backbone.device)
    learnt = batch.labels != IGNORED
    wanted, owners = batch.labels[learnt], layout.owners(batch, owner)[learnt]
    weights = shares.to(backbone.device)[owners]
    sums = torch.zeros(len(shares), dtype=torch.float64, device=backbone.device)

    def loss_of(logits: Tensor, part: slice) -> Tensor:
        each = F.cross_entropy(exact(logits), wanted[part], reduction="none")
        sums.index_add_(0, owners[part], each.detach().double())
        return (each * weights[part].to(each.dtype)).sum()

    with backbone.targets(
        batch.input_ids, batch.attention_mask, batch.labels, layout.laid_several(batch, leaves, owner)
    ) as targets:
        targets.summed(loss_of).backward()  # type: ignore[no-untyped-call]
    return sums.cpu()


def _key_values(prepared: Prepared) -> KeyValuePrefix:
    prefix = part_of(prepared.backbone.fold(prepared.method()), KeyValuePrefix)
    assert prefix is not None
    return prefix


def _leaf(prefix: KeyValuePrefix) -> KeyValuePrefix:
    """A copy where the gradients of several passes gather, before they go on once."""
    keys, values = (tuple(one.detach().requires_grad_() for one in each) for each in (prefix.keys, prefix.values))
    return replace(prefix, keys=keys, values=values)


def _through(made: Sequence[KeyValuePrefix], leaves: Sequence[KeyValuePrefix]) -> None:
    """Send the gradients at `leaves` on into what made them."""
    pairs = [
        (tensor, leaf.grad)
        for prefix, copy in zip(made, leaves, strict=True)
        for tensor, leaf in zip((*prefix.keys, *prefix.values), (*copy.keys, *copy.values), strict=True)
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
