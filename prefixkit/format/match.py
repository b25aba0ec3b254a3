"""Whether a backbone is the one that a prefix was made for, level by level: geometry, config, weights, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefixkit.errors import MismatchError
from prefixkit.format.digest import backbone_digest, config_hash, read_config, tokenizer_hash
from prefixkit.format.manifest import BackboneIdentity

Level = Literal["geometry", "config", "weights", "tokenizer"]
LEVELS: tuple[Level, ...] = ("geometry", "config", "weights", "tokenizer")
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
        "tokenizer": {"tokenizer hash": identity.tokenizer_hash},
    }


def folder_facts(folder: str | Path) -> Facts:
    """What can be known of the backbone in `folder` without building the model.

    Raises:
        BackboneError: no such folder, no config.json, no safetensors weights.
    """
    weights = backbone_digest(folder)
    config = read_config(folder)
    layers = _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers")
    return {
        "geometry": {"layers": layers, "hidden size": _first(config, "hidden_size", "n_embd", "d_model")},
        "config": {
            "architecture": config.get("model_type"),
            "vocabulary": config.get("vocab_size"),
            "config hash": config_hash(folder),
        },
        "weights": {"weights hash": weights},
        "tokenizer": {"tokenizer hash": tokenizer_hash(folder)},
    }


def check(where: object, wanted: Facts, found: Facts, *, allow_mismatch: bool = False) -> Level:
    """Compare level by level and return the deepest one of the model that was compared and is equal.

    Args:
        where: what the message names.
        allow_mismatch: accept another configuration, other weights or another tokenizer. Another geometry cannot
            run and stays refused.

    Raises:
        MismatchError: in one line, the level and what differs.
    """
    reached: Level = "geometry"
    agreed: list[Level] = []
    for level in LEVELS:
        known = [
            name for name, fact in wanted[level].items() if fact is not None and found[level].get(name) is not None
        ]
        for name in known:
            if wanted[level][name] != found[level][name]:
                if allow_mismatch and level != "geometry":
                    return reached
                raise _mismatch(where, f"{name} {wanted[level][name]}", str(found[level][name]), level, agreed)
        agreed += [level] if known else []
        # The same tokenizer says nothing of the model.
        if level != "tokenizer" and any(name.endswith("hash") for name in known):
            reached = level
    return reached


def _mismatch(where: object, expected: str, found: str, level: Level, agreed: Sequence[Level]) -> MismatchError:
    *others, last = agreed or ("",)
    equal = f"; {', '.join(others)} and {last} agree" if others else f"; {last} agrees" if last else ""
    step = "use the backbone that the prefix was trained on"
    if level == "tokenizer":
        step = "use the tokenizer.json of training, or allow the mismatch if it was only saved anew"
    return MismatchError(where, expected=expected, found=f"{found} (checked {level}{equal})", next_step=step)


def _depth(identity: BackboneIdentity) -> int:
    stacks = identity.stacks
    return len(stacks.get("decoder", stacks.get("encoder", ())))


def _first(config: Mapping[str, Any], *names: str) -> object:
    return next((config[name] for name in names if name in config), None)
