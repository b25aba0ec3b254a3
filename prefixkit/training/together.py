"""Several tasks with one prefix: trained together with a head for each, then each task on its own.

Liu et al. 2022 (arXiv 2110.07602) call it multi-task P-Tuning v2; its code was never published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from prefixkit.errors import ConfigError
from prefixkit.injections import TaskHead, joined, parts_of, records_of
from prefixkit.methods.with_head import WithHead
from prefixkit.prefix import Prefix, save
from prefixkit.settings import at_least, check_types, records
from prefixkit.training import loop
from prefixkit.training.checkpoint import State
from prefixkit.training.config import TrainConfig, files_of, from_mapping
from prefixkit.training.interruption import between_steps
from prefixkit.training.out_of_memory import SMALLER, in_a_line
from prefixkit.training.output import check_outputs
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.processes import refuse_several
from prefixkit.training.progress import Listener, Silence, Step


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One of several tasks.

    Attributes:
        data, eval_data, task, output: as of a run of its own.
        steps: of the training on its own, from the shared prefix and its head; 0 keeps these.
    """

    data: str
    output: str
    task: str = "classification"
    eval_data: str | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        check_types(self, "tasks.")
        at_least("tasks.steps", self.steps, 0)


def runs_from(settings: Mapping[str, Any], where: str) -> tuple[TrainConfig, list[TaskRun]]:
    """The shared run that `settings` describe, and its `[[tasks]]`.

    Raises:
        ConfigError: fewer than two tasks, or settings that are none.
    """
    shared = {key: value for key, value in settings.items() if key != "tasks"}
    tasks = records(TaskRun, settings["tasks"], f"{where} [[tasks]]")
    if "data" in shared or len(tasks) < 2:
        found = "data beside them" if "data" in shared else str(len(tasks))
        raise ConfigError(where, expected="two [[tasks]] or more, each with its data", found=found)
    config = from_mapping({**shared, "data": tasks[0].data}, where)
    return config, tasks


def train_together(config: TrainConfig, tasks: Sequence[TaskRun], listener: Listener | None = None) -> list[Prefix]:
    """Train one prefix on all `tasks`, for `config.steps`, then each task on its own, for its own steps.

    Batches are drawn in proportion to the tasks' data. `config.output` gets the shared prefix without a head, each
    task's output its prefix and head, with the shared file as its parent.

    Returns:
        The shared prefix and that of each task.

    Raises:
        InputError: whatever is wrong with a task, or a method that cannot be trained with a head.
    """
    refuse_several("several tasks")
    listener = listener or Silence()
    prepared = _prepared(config, tasks)
    with in_a_line("[[tasks]]", "memory for a step", lambda: SMALLER):
        shared = save(_share(prepared, config, listener), config.output)
    listener.on_message(f"wrote {config.output}, the shared prefix")
    written = [shared]
    with between_steps(listener.on_message) as check:
        for task, one in zip(tasks, prepared, strict=True):
            # What came in the last step of one task is not for the next to find out.
            check()
            own = replace(
                one,
                config=replace(one.config, steps=task.steps),
                total_steps=task.steps,
                parents=(shared.manifest.content or "",),
                method=deepcopy(one.method),
            )
            written.append(loop.complete(own, resume=False, listener=listener))
            listener.on_message(f"wrote {task.output}")
    return written


def _prepared(config: TrainConfig, tasks: Sequence[TaskRun]) -> list[Prepared]:
    """Every task, all with the method and the backbone of the first, each with its own head."""
    prepared: list[Prepared] = []
    runs = [
        replace(config, data=task.data, eval_data=task.eval_data, task=task.task, output=task.output) for task in tasks
    ]
    reads = [path for run in runs for path in files_of(run)]
    check_outputs([config.output, *(run.output for run in runs)], reads, config.backbone, "[[tasks]]")
    for task, own in zip(tasks, runs, strict=True):
        prepared.append(prepare(own, prepared[0].backbone if prepared else None))
        if not isinstance(prepared[-1].method, WithHead) or prepared[-1].method.body is None:
            step = "use --method p-tuning-v2 and tasks that a head answers"
            raise ConfigError("[[tasks]]", expected="a method to share, and heads", found=task.task, next_step=step)
        _method(prepared[-1]).body = _method(prepared[0]).body
    return prepared


def _method(prepared: Prepared) -> WithHead:
    assert isinstance(prepared.method, WithHead)
    return prepared.method


def _share(prepared: Sequence[Prepared], config: TrainConfig, listener: Listener) -> Prefix:
    """The shared prefix, after `config.steps` steps, or as many as bring every task's data once."""
    steps = config.steps if config.steps is not None else sum(one.batches.steps_per_epoch for one in prepared)
    whole = replace(prepared[0], total_steps=steps)
    optimizer = _optimizer(prepared)
    chosen, done = _order(prepared, steps, config.seed), [0] * len(prepared)
    loss = float("nan")
    for number, index in enumerate(chosen):
        one = prepared[index]
        loop.set_rates(optimizer, loop.schedule(number, whole))
        batch = one.batches.batch(done[index])
        loss = loop.step(one, optimizer, batch, done[index])
        done[index] += 1
        listener.on_step(Step(step=number + 1, total=steps, loss=loss, tokens=batch.tokens))
    return _without_head(prepared[0], State(step=steps, last_loss=loss))


def _order(prepared: Sequence[Prepared], steps: int, seed: int) -> list[int]:
    sizes = np.array([one.batches.steps_per_epoch for one in prepared], dtype=np.float64)
    chosen: list[int] = np.random.default_rng(seed).choice(len(prepared), size=steps, p=sizes / sizes.sum()).tolist()
    return chosen


def _optimizer(prepared: Sequence[Prepared]) -> torch.optim.Optimizer:
    optimizer = loop.make_optimizer(prepared[0])
    for one in prepared[1:]:
        method = _method(one)
        head = [method.head_weight, method.head_bias]
        optimizer.add_param_group({"params": head, "peak": one.config.optimizer.head_lr})
    return optimizer


def _without_head(prepared: Prepared, state: State) -> Prefix:
    made = loop.result(prepared, state)
    body = joined(tuple(part for part in parts_of(prepared.method.fold()) if not isinstance(part, TaskHead)))
    return Prefix(replace(made.manifest, injections=records_of(body), task=None), body.arrays())
