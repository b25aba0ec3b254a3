"""A training run as one frozen record, from a TOML file, from flags, or from `--set a.b=c`.

The defaults are the ones that tests/bench/defaults.py chose.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from prefixkit.errors import ConfigError
from prefixkit.methods.catalogue import METHODS, TRAINED, method_file
from prefixkit.methods.method import MethodSettings
from prefixkit.settings import at_least, check_types, not_negative, one_of, positive, record
from prefixkit.spelling import did_you_mean

_LARGEST_SEED = 2**53 - 1
_FILES = ("prefix", "npy")
"""Starts whose argument is a path."""
OF_THE_MACHINE = frozenset(
    ("backbone", "data", "eval_data", "output", "device", "layout", "compile", "shard", "gradient_checkpointing")
)
"""What changes nothing but where files are and how a run is computed."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        name: `adamw`, or `adafactor` as prompt tuning specifies it.
        schedule: `linear` decay to zero, or `constant`; both after the warm-up.
        lr: the peak learning rate; None takes the method's default.
        head_lr: that of a head which is trained beside something else.
        loss: `mean` over target tokens, or `sum` over an example's tokens and mean over examples (the paper's code).
    """

    name: str = "adamw"
    schedule: str = "linear"
    lr: float | None = None
    head_lr: float = 5e-3
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loss: str = "mean"

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        one_of("optimizer.name", self.name, ("adamw", "adafactor"))
        one_of("schedule", self.schedule, ("linear", "constant"))
        one_of("loss", self.loss, ("mean", "sum"))
        at_least("warmup_steps", self.warmup_steps, 0)
        positive("--lr", self.lr)
        positive("head_lr", self.head_lr)
        positive("max_grad_norm", self.max_grad_norm)
        not_negative("weight_decay", self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation during training.

    Attributes:
        every: steps between validations, and between checkpoints; 0 means a tenth of the run.
        patience: validations without improvement before stopping; 0 never stops early.
        limit: validation examples at most, taken evenly through the file.
        metric: the best validation is the one of the lowest `loss`, or of the highest `score`: the accuracy or F1 of
            what a head answers, as P-Tuning v2's code has it. Of equal scores the one of the lower loss.
    """

    every: int = 0
    patience: int = 0
    limit: int = 512
    metric: str = "loss"

    def __post_init__(self) -> None:
        check_types(self, "evaluation.")
        at_least("every", self.every, 0)
        at_least("patience", self.patience, 0)
        at_least("limit", self.limit, 1)
        one_of("evaluation.metric", self.metric, ("loss", "score"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run, beside the code.

    Attributes:
        objective: over what the word at a mask is likely: the whole `vocabulary`, or the `labels`' words alone, as null
            prompts are trained.
        layout: `padded` rows or one `packed` row; `auto` packs on CUDA what can be packed, once a first batch has shown
            the same loss, and has a decoder on a CPU compute once what padded rows begin with alike. Padded rows are of
            similar length, where beginnings are shared with such as begin alike, packed ones at random; a run that is
            resumed keeps the order with which it began, whatever its layout then.
        compile: torch.compile: `on`, `off`, or `auto`, which compiles runs of some length on CUDA; on a CPU it gains
            less than it takes.
        shard: spread the layers of a decoder that does not fit over all of torchrun's processes.
        quantize: `nf4` rounds the backbone's linear layers to four bits a weight; None leaves them as they are.
        gradient_checkpointing: compute the layers again in the backward pass, for the same losses in less memory.
    """

    backbone: str
    data: str
    output: str
    eval_data: str | None = None
    task: str = "text"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    objective: str = "vocabulary"
    layout: str = "auto"
    compile: str = "auto"
    shard: bool = False
    quantize: str | None = None
    gradient_checkpointing: bool = False
    method: MethodSettings = field(default_factory=lambda: method_settings({}))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("objective", self.objective, ("vocabulary", "labels"))
        one_of("--compile", self.compile, ("auto", "on", "off"))
        one_of("layout", self.layout, ("auto", "padded", "packed"))
        one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.quantize is not None:
            one_of("--quantize", self.quantize, ("nf4",))
        at_least("--batch-size", self.batch_size, 1)
        at_least("--steps", self.steps, 0)
        at_least("--seed", self.seed, 0)
        positive("--epochs", self.epochs)
        if self.seed > _LARGEST_SEED:
            raise ConfigError("--seed", expected=f"at most {_LARGEST_SEED}, the largest in JSON", found=str(self.seed))
        self._refuse_pairs()
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("--steps", expected="either --steps or --epochs", found="both")

    def _refuse_pairs(self) -> None:
        """Raise ConfigError for two settings that do not go together, whatever the model."""
        chosen = {
            "shard": self.shard,
            "--gradient-checkpointing": self.gradient_checkpointing,
            "--quantize": self.quantize is not None,
            "--compile on": self.compile == "on",
        }
        for one, other in (
            ("shard", "--gradient-checkpointing"),
            ("shard", "--quantize"),
            ("shard", "--compile on"),
            ("--gradient-checkpointing", "--compile on"),
        ):
            if chosen[one] and chosen[other]:
                raise ConfigError(other, expected=f"one without {one}", found="both", next_step="leave one out")


def method_settings(given: Mapping[str, Any], where: str = "[method]") -> MethodSettings:
    """The settings of the method that `given` names, by default those of prefix-tuning.

    Raises:
        ConfigError: an unknown method, or settings that it does not have.
    """
    name = given.get("name", "prefix-tuning")
    if name not in TRAINED:
        step = f"use `prefixkit {METHODS[name].command}`" if name in METHODS else did_you_mean(str(name), TRAINED)
        raise ConfigError("--method", expected=", ".join(TRAINED), found=repr(name), next_step=step)
    settings: MethodSettings = record(method_file(name).Settings, given, where)
    return settings


def from_mapping(settings: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """The run that nested `settings` describe; sections are `method`, `optimizer` and `evaluation`.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    given = dict(settings)
    if isinstance(given.get("method"), Mapping):
        given["method"] = method_settings(given["method"], f"{where} [method]")
    config: TrainConfig = record(TrainConfig, given, where)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(path, expected="a TOML file", found="no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(path, expected="a TOML file", found=str(error)) from error


def assign(settings: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` to nested `settings`, in place; the value is read as TOML, or else taken as a string."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError("--set", expected="KEY=VALUE such as optimizer.lr=0.01", found=assignment)
    override(settings, key.strip(), toml_value(text.strip()))


def override(settings: dict[str, Any], key: str, value: Any, where: str = "--set") -> None:
    """Give `a.b` in nested `settings` a value, in place. Raises ConfigError, at `where`, for a value with sections."""
    *sections, name = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(where, expected=f"a section named {section}", found="a single value")
    settings[name] = value


def toml_value(text: str) -> Any:
    """What `text` means in TOML, or else itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def recorded(config: TrainConfig) -> dict[str, Any]:
    """What the provenance keeps of `config`: no paths and nothing of the machine; equal runs give equal files."""
    kept = asdict(replace(config, task=Path(config.task).stem))
    for local in OF_THE_MACHINE:
        del kept[local]
    if config.quantize is None:
        del kept["quantize"]
    kind = config.method.init.partition(":")[0]
    kept["method"]["init"] = kind if kind in _FILES else config.method.init
    for name, path in _method_files(config.method).items():
        kept["method"][name] = f"b3-v1:{blake3(path.read_bytes()).hexdigest()}" if path.is_file() else None
    return kept


def files_of(config: TrainConfig) -> list[Path]:
    """What the run reads, beside its backbone."""
    kind, _, argument = config.method.init.partition(":")
    given = (config.data, config.eval_data, config.task, argument if kind in _FILES else None)
    return [*(Path(one) for one in given if one is not None), *_method_files(config.method).values()]


def _method_files(settings: Any) -> dict[str, Path]:
    """The files that a method's own settings name."""
    named = [entry.name for entry in fields(settings) if entry.metadata.get("file")]
    return {name: Path(getattr(settings, name)) for name in named if getattr(settings, name)}
