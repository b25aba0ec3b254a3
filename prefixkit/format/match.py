"""Whether a backbone is the one that a prefix was made for, level by level: geometry, config, weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prefixkit.errors import MismatchError
from prefixkit.format.digest import backbone_digest, config_hash, read_config
from prefixkit.format.manifest import BackboneIdentity

Level = Literal["geometry", "config", "weights"]
Facts = Mapping[Level, Mapping[str, object]]
"""What is known of a backbone, by level and name; None is unknown and not compared."""


def facts(identity: BackboneIdentity) -> Facts:
    """What a manifest knows of its backbone."""
    shapes: dict[str, object] = {}
    windows: dict[str, object] = {}
    for stack, layers in identity.stacks.items():
        for index, layer in enumerate(layers):
            shapes[f"{stack} layer {index}"] = f"{layer.kv_heads} heads of {layer.key_dim} and {layer.value_dim}"
            windows[f"{stack} layer {index}"] = f"window {layer.window}" if layer.window else "full attention"
    stacks = " and ".join(sorted(identity.stacks))
    return {
        "geometry": {"stacks": stacks, "layers": _depth(identity), "hidden size": identity.hidden_size, **shapes},
        "config": {
            "architecture": identity.family,
            "vocabulary": identity.vocab_size,
            **windows,
            "config hash": identity.config_hash,
        },
        "weights": {"weights hash": identity.weights_hash},
    }


def folder_facts(folder: str | Path) -> Facts:
    """What can be known of the backbone in `folder` without building the model.

    Raises:
        BackboneError: no such folder, no config.json, no safetensors weights.
    """
    weights = backbone_digest(folder)
    config = read_config(folder)
    layers = _first(config, "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers")
    return {
        "geometry": {"layers": layers, "hidden size": _first(config, "hidden_size", "n_embd", "d_model")},
        "config": {
            "architecture": config.get("model_type"),
            "vocabulary": config.get("vocab_size"),
            "config hash": config_hash(folder),
        },
        "weights": {"weights hash": weights},
    }


def check(where: object, wanted: Facts, found: Facts, *, allow_mismatch: bool = False) -> Level:
    """Compare level by level and return the deepest one that was compared and is equal.

    Args:
        where: what the message names.
        allow_mismatch: accept another configuration or other weights. Another geometry cannot run and stays refused.

    Raises:
        MismatchError: in one line, the level and what differs.
    """
    reached: Level = "geometry"
    levels: tuple[Level, ...] = ("geometry", "config", "weights")
    for level in levels:
        known = [
            name for name, fact in wanted[level].items() if fact is not None and found[level].get(name) is not None
        ]
        for name in known:
            if wanted[level][name] != found[level][name]:
                if allow_mismatch and level != "geometry":
                    return reached
                raise _mismatch(where, level, name, wanted[level][name], found[level][name])
        if any(name.endswith("hash") for name in known):
            reached = level
    return reached


def _mismatch(where: object, level: Level, name: str, wanted: object, found: object) -> MismatchError:
    equal = {"geometry": "", "config": "; geometry agrees", "weights": "; geometry and config agree"}[level]
    return MismatchError(
        where,
        expected=f"{name} {wanted}",
        found=f"{found} (checked {level}{equal})",
        next_step="use the backbone that the prefix was trained on",
    )


def _depth(identity: BackboneIdentity) -> int:
    stacks = identity.stacks
    return len(stacks.get("decoder", stacks.get("encoder", ())))


def _first(config: Mapping[str, Any], *names: str) -> object:
    return next((config[name] for name in names if name in config), None)
