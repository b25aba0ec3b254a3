"""A training run as one frozen record, from a TOML file, from flags, or from `--set a.b=c`.

The defaults are the ones that tests/bench/defaults.py chose.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PurePath
from typing import Any, get_args, get_type_hints

from prefixkit.errors import ConfigError
from prefixkit.methods.catalogue import METHODS, REPARAMETERIZATIONS
from prefixkit.spelling import did_you_mean

_LARGEST = 1e6
"""No epochs, learning rate, norm or decay beyond it makes sense, and arithmetic ends somewhere."""
_LARGEST_SEED = 2**53 - 1
CHOICES = {
    "reparameterization": REPARAMETERIZATIONS,
    "positions": ("offset", "none"),
    "loss": ("mean", "sum"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is trained.

    Attributes:
        length: prefix slots.
        init: `text` (the training data's own words), `text:WORDS`, `random`, `zeros` or `prefix:FILE`.
        reparameterization: `none`, or `mlp` as in the paper.
        bottleneck: width of the MLP's middle layer.
        positions: `offset` counts the text from `length`, as decoders' caches do; `none` counts it from 0.
    """

    name: str = "prefix-tuning"
    length: int = 16
    init: str = "text"
    reparameterization: str = "none"
    bottleneck: int = 512
    positions: str = "offset"

    def __post_init__(self) -> None:
        _coerce(self, "method.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear decay to zero.

    Attributes:
        lr: the peak learning rate; None takes the method's default.
        loss: `mean` over target tokens, or `sum` over an example's tokens and mean over examples (the paper's code).
    """

    lr: float | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loss: str = "mean"

    def __post_init__(self) -> None:
        _coerce(self, "optimizer.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation during training.

    Attributes:
        every: steps between validations, and between checkpoints; 0 means a tenth of the run.
        patience: validations without improvement before stopping; 0 never stops early.
        limit: validation examples at most, taken evenly through the file.
    """

    every: int = 0
    patience: int = 0
    limit: int = 512

    def __post_init__(self) -> None:
        _coerce(self, "evaluation.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run, beside the code."""

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
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _coerce(self, "")
        _check(self)


def from_mapping(settings: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """The run that nested `settings` describe; sections are `method`, `optimizer` and `evaluation`.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    config: TrainConfig = _record(TrainConfig, settings, where)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(path, expected="a TOML file", found="no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(path, expected="a TOML file", found=str(error)) from error


def override(settings: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` to nested `settings`, in place; the value is read as TOML, or else taken as a string."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError("--set", expected="KEY=VALUE such as optimizer.lr=0.01", found=assignment)
    *sections, name = key.strip().split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError("--set", expected=f"a section named {section}", found="a single value")
    settings[name] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _record(kind: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    hints, known = get_type_hints(kind), [entry.name for entry in fields(kind)]
    given: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(where, expected="a known setting", found=repr(key), next_step=did_you_mean(key, known))
        if key in ("method", "optimizer", "evaluation") and isinstance(value, Mapping):
            given[key] = _record(hints[key], value, f"{where} [{key}]")
        else:
            given[key] = _typed(value, hints[key], f"{where} {key}")
    missing = [key for key in ("backbone", "data", "output") if key in known and key not in given]
    if missing:
        raise ConfigError(where, expected=f"--{missing[0]}", found="none")
    return kind(**given)


def _coerce(config: Any, section: str) -> None:
    """Check the types of a record that was made in Python; paths become strings and whole numbers floats."""
    for name, hint in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _typed(getattr(config, name), hint, f"{section}{name}"))


def _typed(value: Any, hint: Any, where: str) -> Any:
    accepted = get_args(hint) or (hint,)
    if float in accepted and type(value) is int:
        return float(value)
    if str in accepted and isinstance(value, PurePath):
        return str(value)
    if type(value) not in accepted:
        names = " or ".join(sorted(_kind(kind) for kind in accepted if kind is not type(None)))
        raise ConfigError(where, expected=names, found=repr(value), next_step="see the settings of `prefixkit train`")
    return value


def _kind(kind: type[Any]) -> str:
    named = {int: "a whole number", float: "a number", str: "a string"}
    return f"a section of {', '.join(entry.name for entry in fields(kind))}" if is_dataclass(kind) else named[kind]


def _check(config: TrainConfig) -> None:
    if config.method.name not in METHODS:
        known = ", ".join(METHODS)
        step = did_you_mean(config.method.name, METHODS)
        raise ConfigError("--method", expected=known, found=repr(config.method.name), next_step=step)
    if config.steps is not None and config.epochs is not None:
        raise ConfigError("--steps", expected="either --steps or --epochs", found="both")
    for section in (config, config.method, config.optimizer):
        for name, choices in CHOICES.items():
            value = getattr(section, name, choices[0])
            if value not in choices:
                step = did_you_mean(str(value), choices)
                raise ConfigError(name, expected=" or ".join(choices), found=repr(value), next_step=step)
    _check_ranges(config)


def _check_ranges(config: TrainConfig) -> None:
    least: dict[str, tuple[int | None, int]] = {
        "--length": (config.method.length, 1),
        "--batch-size": (config.batch_size, 1),
        "--steps": (config.steps, 0),
        "--seed": (config.seed, 0),
        "bottleneck": (config.method.bottleneck, 1),
        "warmup_steps": (config.optimizer.warmup_steps, 0),
        "every": (config.evaluation.every, 0),
        "patience": (config.evaluation.patience, 0),
        "limit": (config.evaluation.limit, 1),
    }
    for name, (number, lowest) in least.items():
        if number is not None and number < lowest:
            raise ConfigError(name, expected=f"at least {lowest}", found=str(number))
    if config.seed > _LARGEST_SEED:
        raise ConfigError("--seed", expected=f"at most {_LARGEST_SEED}, the largest in JSON", found=str(config.seed))
    positive = {
        "--epochs": config.epochs,
        "--lr": config.optimizer.lr,
        "max_grad_norm": config.optimizer.max_grad_norm,
    }
    for name, amount in positive.items():
        if amount is not None and not 0 < amount <= _LARGEST:
            raise ConfigError(name, expected=f"a positive number, at most {_LARGEST:g}", found=str(amount))
    decay = config.optimizer.weight_decay
    if not 0 <= decay <= _LARGEST:
        raise ConfigError("weight_decay", expected=f"from 0 to {_LARGEST:g}", found=str(decay))


def recorded(config: TrainConfig) -> dict[str, Any]:
    """What the provenance keeps of `config`: no paths and nothing of the machine; equal runs give equal files."""
    kept = asdict(replace(config, task=Path(config.task).stem))
    for local in ("backbone", "data", "eval_data", "output", "device"):
        del kept[local]
    if config.method.init.startswith("prefix:"):
        kept["method"]["init"] = "prefix"
    return kept
