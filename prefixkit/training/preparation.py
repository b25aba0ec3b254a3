"""From a configuration to everything a run needs: backbone, task, batches, method."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.load import load_backbone
from prefixkit.data.batches import EncodedExample, TrainingBatches, encode_examples
from prefixkit.data.readers import Example, data_hash, read_examples
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import BackboneIdentity, TaskRecord
from prefixkit.injections import Injection, injection
from prefixkit.methods.catalogue import METHODS, method_file
from prefixkit.methods.method import Material, Method
from prefixkit.prefix import load, matches
from prefixkit.task import ModelTokenizer, input_fields, load_task, load_tokenizer
from prefixkit.training.config import TrainConfig, files_of

LEAST_STEPS = 500


@dataclass
class Prepared:
    """What a run works with.

    Attributes:
        method: what is trained.
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
    check_output(config)
    torch.manual_seed(config.seed)
    backbone = load_backbone(config.backbone, device=device(config.device), dtype=config.dtype)
    config = _for_backbone(config, backbone)
    tokenizer = load_tokenizer(backbone.folder)
    room = room_for_text(backbone, config.method.length)
    task = load_task(config.task, tokenizer, max_length=room, paired=backbone.paired)
    task = replace(task, filler_id=tokenizer.eos_id if task.filler_id is None else task.filler_id)
    examples = read_examples(config.data, fields=input_fields(task))
    encoded = encode_examples(task, tokenizer, examples)
    parents = _Parents(backbone.identity)
    material = Material(
        backbone=backbone,
        words=_own_words(encoded, config.method.length),
        tokenize=tokenizer.encode_text,
        parent=parents.read,
        labels=[tokenizer.encode_text(label) for label in task.labels or ()],
        bos_id=_promised_bos(config, backbone, task, tokenizer),
        seed=config.seed,
    )
    batches = TrainingBatches(encoded, batch_size=config.batch_size, seed=config.seed, paired=backbone.paired)
    held_out = _held_out(config, task)
    method = _method(config, backbone, material)
    return Prepared(
        config=_resolved(config, batches.steps_per_epoch),
        backbone=backbone,
        task=task,
        method=method,
        batches=batches,
        validation=encode_examples(task, tokenizer, held_out),
        total_steps=_total_steps(config, batches.steps_per_epoch),
        data_hash=data_hash(examples),
        validation_hash=data_hash(held_out) if held_out else None,
        start_digest=memory_digest(method),
        parents=tuple(parents.digests),
    )


def check_output(config: TrainConfig) -> None:
    """Refuse an output that could not be written after hours of training, or that would replace what training reads.

    Raises:
        ConfigError: no such folder, no permission, the path of a folder or a device, or one of the run's own inputs.
    """
    path = Path(config.output)
    if path.is_dir():
        raise ConfigError(path, expected="the path of a file", found="a folder", next_step="add a file name")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(path, expected="the path of a file", found="a device", next_step="choose another name")
    if not path.parent.is_dir():
        raise ConfigError(path, expected="an existing folder", found=f"no {path.parent}", next_step="create it first")
    for given in files_of(config):
        if path.exists() and given.exists() and path.samefile(given):
            raise ConfigError(
                path, expected="a new file", found="an input of this run", next_step="choose another name"
            )
    if path.resolve().is_relative_to(Path(config.backbone).resolve()):
        raise ConfigError(path, expected="a place outside the backbone's folder", found="one inside it")
    _probe(path)


def _probe(path: Path) -> None:
    # The longest name that the run will write beside its output.
    probe = Path(f"{path}.checkpoint.probe")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError(
            path, expected="a file that can be written", found=found, next_step="choose another"
        ) from error


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
    examples = read_examples(config.eval_data, fields=input_fields(task))
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


def _own_words(encoded: list[EncodedExample], length: int) -> list[int]:
    """The first `length` tokens of the training data: the task itself, in the words it will be asked in."""
    words: list[int] = []
    for example in encoded:
        words += [*example.prompt, *example.target]
        if len(words) >= length:
            break
    return words


def _promised_bos(config: TrainConfig, backbone: Backbone, task: TaskRecord, tokenizer: ModelTokenizer) -> int | None:
    """The token that the first slot has to hold for `task`. Raises ConfigError where it cannot."""
    if task.bos != "before":
        return None
    if backbone.paired:
        expected, step = f'bos = "after" or "none" for an {backbone.kind}', "no slot stands before what it writes"
        raise ConfigError("task", expected=expected, found='"before"', next_step=step)
    if config.method.init.partition(":")[0] != "text" or tokenizer.bos_id is None:
        found = "none in the tokenizer" if tokenizer.bos_id is None else f"--init {config.method.init}"
        raise ConfigError("task", expected='for bos = "before" a prefix that starts from text with a BOS', found=found)
    return tokenizer.bos_id


@dataclass
class _Parents:
    """The prefix files that a method starts from, each checked against the backbone."""

    identity: BackboneIdentity
    digests: list[str] = field(default_factory=list)

    def read(self, path: str) -> Injection:
        parent = load(path)
        matches(parent, self.identity)
        self.digests.append(parent.manifest.content or "")
        return injection(parent)
