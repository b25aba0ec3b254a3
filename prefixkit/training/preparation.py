"""From a configuration to everything a run needs: backbone, task, batches, method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefixkit.backbones.attention import uses_registry
from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.fused import fuse_activations
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.onednn import multiply_by_onednn, multiply_by_torch
from prefixkit.backbones.recomputation import recompute
from prefixkit.backbones.short_attention import attend_short_rows
from prefixkit.data.batches import TrainingBatches
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection
from prefixkit.methods.catalogue import METHODS
from prefixkit.methods.method import Method
from prefixkit.prefix import Prefix
from prefixkit.training import layout
from prefixkit.training.config import TrainConfig, files_of
from prefixkit.training.examples import Data, with_labels
from prefixkit.training.fitting import in_slots, on_backbone, task_on
from prefixkit.training.heap import Heap, trimmer
from prefixkit.training.loading import loaded
from prefixkit.training.material import material_for
from prefixkit.training.objectives import AmongLabels, Distillation, Objective, next_token
from prefixkit.training.output import check_output
from prefixkit.training.processes import ALONE, Group
from prefixkit.training.reading import answer_loss
from prefixkit.training.start import method_for

LEAST_STEPS = 500


@dataclass
class Prepared:
    """What a run works with.

    Attributes:
        method: what is trained.
        objective: what it minimises.
        config: with every default that depends on the method or the data filled in.
        validation: encoded validation examples; empty without validation data.
        held_out: the same examples as they were read.
        data_hash, validation_hash: of the examples, whatever file they came from; None without validation data.
        start_digest: of the method's parameters before the first step.
        parents: content digests of the prefixes that this one starts from.
        unpacked: a sentence where batches are padded although a packed row would be faster.
        heap: where tensors are put on a CPU.
        group: the processes that do it.
        share: from a step to the summed loss of this process's share of its batch, where there are several.
    """

    config: TrainConfig
    backbone: Backbone
    task: TaskRecord
    method: Method
    objective: Objective
    batches: TrainingBatches
    validation: list[Any]
    held_out: list[Any]
    total_steps: int
    data_hash: str
    validation_hash: str | None
    start_digest: str
    parents: tuple[str, ...]
    unpacked: str | None = None
    heap: Heap = field(default_factory=Heap)
    group: Group = ALONE
    share: Callable[[int], Tensor] | None = None


def prepare(
    config: TrainConfig, backbone: Backbone | None = None, data: Data | None = None, group: Group = ALONE
) -> Prepared:
    """Load and check everything before the first step.

    Args:
        backbone: the one that `config` names, where it is loaded already.
        data: what other runs of the backbone have read already.

    Raises:
        InputError: whatever is wrong with the backbone, the data, the task or the options.
    """
    check_output(config.output, files_of(config), config.backbone)
    data = data or Data()
    torch.manual_seed(config.seed)
    _refuse_deltas(config)
    backbone = backbone or loaded(config, group)
    _compute_for(config, backbone)
    config = on_backbone(config, backbone)
    task, tokenizer = task_on(config, backbone)
    config = in_slots(config, task)
    examples = data.read(config.data, task)
    task = with_labels(task, examples, config.data)
    encoded = data.encode(task, tokenizer, backbone, examples)
    held_out = _held_out(config, task, data)
    parents: list[Prefix] = []
    material = material_for(config, backbone, task, tokenizer, encoded, parents)
    method = method_for(config, backbone, task, material, parents)
    teacher = backbone.fold(method.teacher) if method.teacher is not None else None
    if (left := backbone.room_behind(teacher or method())) is not None and left < task.max_length:
        task = replace(task, max_length=left)
        encoded = data.encode(task, tokenizer, backbone, examples)
    collate, unpacked = layout.chosen(config.layout, task, backbone, (method(), teacher))
    order = layout.order(collate, task, backbone)
    batches = TrainingBatches(encoded, batch_size=config.batch_size, seed=config.seed, collate=collate, order=order)
    return Prepared(
        config=_resolved(config, batches.steps_per_epoch),
        backbone=backbone,
        task=task,
        method=method,
        objective=_objective(config, backbone, task, material.labels, teacher, method.top),
        batches=batches,
        validation=data.encode(task, tokenizer, backbone, held_out) if held_out else [],
        held_out=held_out,
        total_steps=_total_steps(config, batches.steps_per_epoch),
        data_hash=data.hash(examples),
        validation_hash=data.hash(held_out) if held_out else None,
        start_digest=memory_digest(method),
        parents=tuple(parent.manifest.content or "" for parent in parents),
        unpacked=unpacked,
        heap=Heap(trimmer(backbone.device)),
        group=group,
    )


def _compute_for(config: TrainConfig, backbone: Backbone) -> None:
    """Let `backbone`, which may come from another run, compute as this one is to."""
    fuse_activations(backbone.model)
    (multiply_by_torch if config.compile == "on" else multiply_by_onednn)(backbone.model)
    if uses_registry(backbone.model):
        attend_short_rows(backbone.model)
    backbone.shares_beginnings = config.layout == "auto" and config.compile != "on"
    if config.gradient_checkpointing:
        recompute(backbone.model)


def _refuse_deltas(config: TrainConfig) -> None:
    """Raise ConfigError for deltas on rounded parameters: they would make up for the rounding, not for the task."""
    if config.quantize is not None and METHODS[config.method.name].injection == "parameter_delta":
        step = "leave --quantize out, or use --method prefix-tuning"
        expected = "a method that leaves the parameters of a quantized backbone alone"
        raise ConfigError("--quantize", expected=expected, found=config.method.name, next_step=step)


def _objective(
    config: TrainConfig,
    backbone: Backbone,
    task: TaskRecord,
    words: Sequence[Sequence[int]],
    teacher: Injection | None,
    top: int,
) -> Objective:
    if config.objective == "labels":
        if backbone.kind != "encoder" or task.verbalizer is None or any(len(word) != 1 for word in words):
            expected = "an encoder and a verbalizer of single tokens for the objective 'labels'"
            raise ConfigError("objective", expected=expected, found=f"{backbone.kind}, task {task.name}")
        return AmongLabels(tuple(token for (token,) in words))
    if task.answer is not None:
        return answer_loss
    return next_token if teacher is None else Distillation(teacher, top)


def _held_out(config: TrainConfig, task: TaskRecord, data: Data) -> list[Any]:
    if config.evaluation.metric == "score" and (task.answer is None or config.eval_data is None):
        found = "a task answered in words" if task.answer is None else "no --eval-data"
        raise ConfigError("evaluation.metric", expected="a head's answers to score", found=found, next_step="use loss")
    if config.eval_data is None:
        return []
    return data.read(config.eval_data, task, config.evaluation.limit)


def _resolved(config: TrainConfig, steps_per_epoch: int) -> TrainConfig:
    """`config` with what its defaults mean for this method and this data, so that the provenance says it."""
    optimizer = config.optimizer
    if optimizer.lr is None:
        optimizer = replace(optimizer, lr=config.method.default_lr)
    return replace(config, optimizer=optimizer, steps=_total_steps(config, steps_per_epoch), epochs=None)


def _total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        return max(1, round(config.epochs * steps_per_epoch))
    return max(LEAST_STEPS, steps_per_epoch)
