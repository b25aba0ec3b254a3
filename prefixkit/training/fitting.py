"""What the method and the task of a run are on its backbone, or why they are not for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.vision import VisionEncoder
from prefixkit.errors import ConfigError
from prefixkit.format.consistency import ends_in_slot
from prefixkit.format.manifest import TaskRecord
from prefixkit.methods.catalogue import METHODS
from prefixkit.task import ModelTokenizer, image_task, load_task, load_tokenizer, slots_of
from prefixkit.training.config import TrainConfig


def on_backbone(config: TrainConfig, backbone: Backbone) -> TrainConfig:
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
            found=f"{backbone.identity.family}, of the kind {backbone.kind}",
            next_step=f"use --method {fitting}",
        )
    in_embeddings = entry.slots != "none" and entry.injection != "key_value_prefix"
    if in_embeddings and backbone.model.get_input_embeddings().embedding_dim != backbone.hidden_size:
        # ELECTRA's small models: a file states one width for tokens and states.
        expected = f"token vectors as wide as the states, {backbone.hidden_size}"
        found, step = str(backbone.vocabulary.shape[1]), "use --method p-tuning-v2"
        raise ConfigError(f"--method {entry.name}", expected=expected, found=found, next_step=step)
    return replace(config, method=config.method.on(backbone.kind))


def task_on(config: TrainConfig, backbone: Backbone) -> tuple[TaskRecord, ModelTokenizer | None]:
    """What a run is to read and write, and with which tokenizer; images have none.

    Raises:
        ConfigError: a task of another kind of input, or one whose slots the method does not fill.
    """
    if isinstance(backbone, VisionEncoder):
        if config.task not in ("text", "images"):
            raise ConfigError("--task", expected="images, on an encoder of images", found=repr(config.task))
        return image_task(backbone.folder, int(backbone.model.config.num_channels)), None
    tokenizer = load_tokenizer(backbone.folder)
    room = _room_for_text(backbone, config.method.length)
    task = load_task(config.task, tokenizer, max_length=room, kind=backbone.kind)
    _check_slots(config.method.name, task)
    filler = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.named_id("sep_token")
    return replace(task, filler_id=filler if task.filler_id is None else task.filler_id), tokenizer


def _check_slots(method: str, task: TaskRecord) -> None:
    """Raise ConfigError for slots that a method does not fill or could be read at, or for none where it needs some."""
    slots, needs = slots_of(task), METHODS[method].slots
    if slots and needs == "none":
        step = f"use --method {' or '.join(name for name, entry in METHODS.items() if entry.slots != 'none')}"
        raise ConfigError(f"--method {method}", expected="a task without slots", found=f"{slots}", next_step=step)
    if not slots and needs == "needed":
        step = 'write {slot} into its templates, such as "{cls}{text}{slot}{slot}{mask}{slot}"'
        raise ConfigError(f"--method {method}", expected="a task with slots", found="none", next_step=step)
    if slots and METHODS[method].injection == "key_value_prefix" and ends_in_slot(task.separator):
        expected, step = "a separator that ends in text", r'write it behind the slots, such as "{slot}{slot}\n"'
        raise ConfigError(f"task {task.name}", expected=expected, found=repr(task.separator), next_step=step)


def in_slots(config: TrainConfig, task: TaskRecord) -> TrainConfig:
    """`config` with a vector for each slot of the task, where it has some.

    Raises:
        ConfigError: a length that was asked for and is another one.
    """
    slots = slots_of(task)
    if not slots:
        return config
    method: Any = config.method
    if method.length not in (slots, type(method).length):
        step = f"leave --length out, or write {{slot}} {method.length} times"
        raise ConfigError("--length", expected=f"{slots}, a vector a slot", found=str(method.length), next_step=step)
    return replace(config, method=replace(method, length=slots))


def _room_for_text(backbone: Backbone, length: int) -> int:
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
