"""From a configuration to everything a run needs: backbone, task, batches, method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.load import load_backbone
from prefixkit.data.batches import EncodedExample, TrainingBatches, encode_examples
from prefixkit.data.readers import Example, data_hash, read_examples
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.methods.catalogue import METHODS, method_file
from prefixkit.methods.method import Material, Method
from prefixkit.task import input_fields, load_task, load_tokenizer
from prefixkit.training.config import TrainConfig, files_of
from prefixkit.training.material import material_for
from prefixkit.training.objectives import Distillation, Objective, next_token
from prefixkit.training.output import check_output

LEAST_STEPS = 500


@dataclass
class Prepared:
    """What a run works with.

    Attributes:
        method: what is trained.
        objective: what it minimises.
        config: with every default that depends on the method or the data filled in.
        validation: encoded validation examples; empty without validation data.
        data_hash, validation_hash: of the examples, whatever file they came from; None without validation data.
        start_digest: of the method's parameters before the first step.
        parents: content digests of the prefixes that this one starts from.
    """

    config: TrainConfig
    backbone: Backbone
    task: TaskRecord
    method: Method
    objective: Objective
    batches: TrainingBatches
    validation: list[EncodedExample]
    total_steps: int
    data_hash: str
    validation_hash: str | None
    start_digest: str
    parents: tuple[str, ...]


def prepare(config: TrainConfig) -> Prepared:
    """Load and check everything before the first step.

    Raises:
        InputError: whatever is wrong with the backbone, the data, the task or the options.
    """
    check_output(config.output, files_of(config), config.backbone)
    torch.manual_seed(config.seed)
    backbone = load_backbone(config.backbone, device=device(config.device), dtype=config.dtype)
    config = _for_backbone(config, backbone)
    tokenizer = load_tokenizer(backbone.folder)
    room = room_for_text(backbone, config.method.length)
    task = load_task(config.task, tokenizer, max_length=room, paired=backbone.paired)
    task = replace(task, filler_id=tokenizer.eos_id if task.filler_id is None else task.filler_id)
    examples = read_examples(config.data, fields=input_fields(task), verbalizer=task.verbalizer)
    encoded = encode_examples(task, tokenizer, examples)
    held_out = _held_out(config, task)
    parents: list[str] = []
    material = material_for(config, backbone, task, tokenizer, encoded, parents)
    method = _method(config, backbone, material)
    teacher = backbone.fold(method.teacher) if method.teacher is not None else None
    if (left := backbone.room_behind(teacher)) is not None and left < task.max_length:
        task = replace(task, max_length=left)
        encoded = encode_examples(task, tokenizer, examples)
    batches = TrainingBatches(encoded, batch_size=config.batch_size, seed=config.seed, paired=backbone.paired)
    return Prepared(
        config=_resolved(config, batches.steps_per_epoch),
        backbone=backbone,
        task=task,
        method=method,
        objective=next_token if teacher is None else Distillation(teacher),
        batches=batches,
        validation=encode_examples(task, tokenizer, held_out),
        total_steps=_total_steps(config, batches.steps_per_epoch),
        data_hash=data_hash(examples),
        validation_hash=data_hash(held_out) if held_out else None,
        start_digest=memory_digest(method),
        parents=tuple(parents),
    )


def device(choice: str) -> str:
    """`auto` is CUDA where there is one. Raises ConfigError for `cuda` without one."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", expected="a CUDA device", found="none", next_step="use --device cpu")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"


def _for_backbone(config: TrainConfig, backbone: Backbone) -> TrainConfig:
    """`config` with the method's settings as they are on this kind of backbone.

    Raises:
        ConfigError: the method, or a setting of it, is for another kind.
    """
    entry = METHODS[config.method.name]
    if backbone.kind not in entry.backbones:
        fitting = " or ".join(name for name, other in METHODS.items() if backbone.kind in other.backbones)
        raise ConfigError(
            f"--method {entry.name}",
            expected=f"a backbone of the kind {' or '.join(entry.backbones)}",
            found=f"{backbone.identity.family}, an {backbone.kind}",
            next_step=f"use --method {fitting}",
        )
    return replace(config, method=config.method.on(backbone.kind))


def room_for_text(backbone: Backbone, length: int) -> int:
    """Tokens of text that fit behind a prefix of `length`.

    Raises:
        ConfigError: the prefix alone fills the context.
        BackboneError: a sliding window would swallow the prefix.
    """
    room = backbone.room_for_text(length)
    if room is not None and room <= 1:
        expected = f"a prefix shorter than the context of {backbone.context_length} tokens"
        raise ConfigError("--length", expected=expected, found=str(length))
    # Without a stated context (ALiBi, T5) a limit still keeps one stray example from filling the memory.
    return room if room is not None else 2048


def _held_out(config: TrainConfig, task: TaskRecord) -> list[Example]:
    if config.eval_data is None:
        return []
    examples = read_examples(config.eval_data, fields=input_fields(task), verbalizer=task.verbalizer)
    # Evenly through the file: the references of one input often stand together.
    return examples[:: -(-len(examples) // config.evaluation.limit)]


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


def _method(config: TrainConfig, backbone: Backbone, material: Material) -> Method:
    method = method_file(config.method.name).make(config.method, material).to(backbone.device)
    backbone.refuse_unplaceable(method())
    return method
