"""From a configuration to everything a run needs: backbone, task, batches, method."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import refuse_swallowed
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.positions import refuse_unplaceable
from prefixkit.data.batches import EncodedExample, TrainingBatches, encode_examples
from prefixkit.data.readers import Example, data_hash, read_examples
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions, TaskRecord
from prefixkit.injections import KeyValuePrefix, key_value_prefix
from prefixkit.methods import initialization
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.prefix import load, matches
from prefixkit.task import ModelTokenizer, input_fields, load_task, load_tokenizer
from prefixkit.training.config import TrainConfig

LEAST_STEPS = 500
# Chosen by tests/bench/defaults.py.
DEFAULT_LR = {"none": 1e-1, "mlp": 2e-3}
INITIALIZATIONS = ("text", "text:WORDS", "random", "zeros", "prefix:FILE")


@dataclass
class Prepared:
    """What a run works with.

    Attributes:
        method: the trainable prefix.
        config: with every default that depends on the method or the data filled in.
        validation: encoded validation examples; empty without validation data.
        data_hash, validation_hash: of the examples, whatever file they came from; None without validation data.
        start_digest: of the method's parameters before the first step.
        parents: content digests of the prefixes that this one starts from.
    """

    config: TrainConfig
    backbone: Decoder
    task: TaskRecord
    method: PrefixTuning
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
    tokenizer = load_tokenizer(backbone.folder)
    task = load_task(config.task, tokenizer, max_length=room_for_text(backbone, config.method.length))
    task = replace(task, filler_id=tokenizer.eos_id if task.filler_id is None else task.filler_id)
    examples = read_examples(config.data, fields=input_fields(task))
    encoded = encode_examples(task, tokenizer, examples)
    start, parents = _start(config, backbone, task, tokenizer, encoded)
    batches = TrainingBatches(encoded, batch_size=config.batch_size, seed=config.seed)
    held_out = _held_out(config, task)
    method = _method(config, backbone, start)
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
        parents=parents,
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
    for given in (config.data, config.eval_data, config.task, config.method.init.removeprefix("prefix:")):
        if given is not None and path.exists() and Path(given).exists() and path.samefile(given):
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


def room_for_text(backbone: Decoder, length: int) -> int:
    """Tokens of text that fit behind a prefix of `length`.

    Raises:
        ConfigError: the prefix alone fills the context.
        BackboneError: a sliding window would swallow the prefix.
    """
    refuse_swallowed(backbone.geometry, length, backbone.identity.name)
    context = backbone.context_length
    if context is not None and length >= context - 1:
        expected = f"a prefix shorter than the context of {context} tokens"
        raise ConfigError("--length", expected=expected, found=str(length))
    # Without a stated context (ALiBi) a limit still keeps one stray example from filling the memory.
    return (context - length) if context is not None else 2048


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
        optimizer = replace(optimizer, lr=DEFAULT_LR[config.method.reparameterization])
    return replace(config, optimizer=optimizer, steps=_total_steps(config, steps_per_epoch), epochs=None)


def _total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        return max(1, round(config.epochs * steps_per_epoch))
    return max(LEAST_STEPS, steps_per_epoch)


def _method(config: TrainConfig, backbone: Decoder, start: KeyValuePrefix) -> PrefixTuning:
    offset = config.method.positions == "offset"
    positions = Positions(text_start=start.length if offset else 0, prefix_takes_positions=offset)
    refuse_unplaceable(backbone.model, positions, start.length)
    return PrefixTuning(
        replace(start, positions=positions),
        reparameterization=config.method.reparameterization,
        hidden=backbone.identity.hidden_size,
        bottleneck=config.method.bottleneck,
        paper_start=config.method.init == "random",
    ).to(backbone.device)


def _start(
    config: TrainConfig,
    backbone: Decoder,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    encoded: list[EncodedExample],
) -> tuple[KeyValuePrefix, tuple[str, ...]]:
    kind, _, argument = config.method.init.partition(":")
    length = config.method.length
    words = tokenizer.encode_text(argument) if kind == "text" and argument else _own_words(encoded, length)
    if task.bos == "before":
        words = _with_bos(kind, words, tokenizer)
    if kind == "text":
        start = initialization.from_text(backbone, words, length)
        # A trained BOS would no longer be the one that the contract promises.
        return replace(start, frozen_slots=1 if task.bos == "before" else 0), ()
    if kind == "random" and not argument:
        return initialization.random_like(backbone, words, length, config.seed), ()
    if kind == "zeros" and not argument:
        return initialization.zeros(backbone, length), ()
    if kind == "prefix" and argument:
        return _from_file(argument, backbone, length)
    raise ConfigError("--init", expected=" or ".join(INITIALIZATIONS), found=repr(config.method.init))


def _own_words(encoded: list[EncodedExample], length: int) -> list[int]:
    """The first `length` tokens of the training data: the task itself, in the words it will be asked in."""
    words: list[int] = []
    for example in encoded:
        words += [*example.prompt, *example.target]
        if len(words) >= length:
            break
    return words


def _with_bos(kind: str, words: list[int], tokenizer: ModelTokenizer) -> list[int]:
    if kind != "text" or tokenizer.bos_id is None:
        found = "none in the tokenizer" if tokenizer.bos_id is None else f"--init {kind}"
        raise ConfigError("task", expected='for bos = "before" a prefix that starts from text with a BOS', found=found)
    return [tokenizer.bos_id, *words]


def _from_file(path: str, backbone: Decoder, length: int) -> tuple[KeyValuePrefix, tuple[str, ...]]:
    parent = load(path)
    matches(parent, backbone.identity)
    start = key_value_prefix(parent)
    if start.length != length:
        step = f"use --length {start.length}"
        raise ConfigError("--init", expected=f"a prefix of {length} slots", found=f"{start.length}", next_step=step)
    return start, (parent.manifest.content or "",)
