"""The backbone of a run: where it is loaded to, whole or in part."""

from __future__ import annotations

import torch

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.sharding import shard
from prefixkit.errors import ConfigError
from prefixkit.methods.catalogue import METHODS
from prefixkit.training.config import TrainConfig
from prefixkit.training.processes import ALONE, Group


def loaded(config: TrainConfig, group: Group = ALONE) -> Backbone:
    """The backbone of a run, or this process's share of it.

    Raises:
        BackboneError: it cannot be read, or is of no known kind.
        ConfigError: it cannot be quantised here, or spread.
    """
    _check_shard(config, group)
    where = device(config.device)
    if not config.shard:
        return load_backbone(config.backbone, device=where, dtype=config.dtype, quantize=config.quantize)
    backbone = load_backbone(config.backbone, dtype=config.dtype)
    shard(backbone, where)
    return backbone


def _check_shard(config: TrainConfig, group: Group) -> None:
    """Raise ConfigError for a backbone that is to be spread and cannot."""
    if config.shard and group.size == 1:
        step = "start it with torchrun, or leave it out"
        raise ConfigError("shard", expected="processes to spread the backbone over", found="one", next_step=step)
    if config.shard and METHODS[config.method.name].injection == "parameter_delta":
        found, step = f"--method {config.method.name}", "leave it out"
        raise ConfigError("shard", expected="a method beside the weights", found=found, next_step=step)


def device(choice: str) -> str:
    """`auto` is CUDA where there is one. Raises ConfigError for `cuda` without one."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", expected="a CUDA device", found="none", next_step="use --device cpu")
    return "cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu"
