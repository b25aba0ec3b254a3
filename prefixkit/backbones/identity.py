"""Who a backbone is: the part of a manifest that names the frozen model, and the proof that it stayed frozen."""

from __future__ import annotations

import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from prefixkit.backbones.positions import has_alibi
from prefixkit.format.digest import backbone_digest, config_hash, tokenizer_hash, weight_files
from prefixkit.format.header import read_header
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def identify(
    folder: Path,
    name: str,
    revision: str | None,
    config: PreTrainedConfig,
    geometry: tuple[LayerGeometry, ...],
    *,
    encoder: tuple[LayerGeometry, ...] = (),
    weights: bool = True,
) -> BackboneIdentity:
    """The identity of the backbone stored in `folder`; its weights are hashed as stored (cached by path, size, mtime).

    `geometry` is the decoder's, empty without one; `encoder` that of an encoder. Without `weights` only what
    config.json says is stated, for prefixes of which nobody knows more.
    """
    return BackboneIdentity(
        name=name,
        revision=revision,
        family=config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=getattr(config, "vocab_size", 0),
        context_length=context_length(config),
        dtype=_stored_dtype(folder) if weights else str(config.dtype or "unknown").removeprefix("torch."),
        config_hash=config_hash(folder),
        weights_hash=backbone_digest(folder) if weights else None,
        tokenizer_hash=tokenizer_hash(folder) if weights else None,
        stacks={name: layers for name, layers in (("decoder", geometry), ("encoder", encoder)) if layers},
        rope=_rope(config),
    )


def _stored_dtype(folder: Path) -> str:
    """The dtype of most weights in `folder`; config.json may name another, or none."""
    sizes: Counter[str] = Counter()
    for file in weight_files(folder):
        for entry in read_header(file).tensors.values():
            sizes[entry.dtype] += prod(entry.shape)
    most = sizes.most_common(1)[0][0]
    return _DTYPES.get(most, most.lower())


def context_length(config: PreTrainedConfig) -> int | None:
    """How many positions the model was built for; None for ALiBi models, whose positions have no end."""
    if has_alibi(config):
        return None
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def _rope(config: PreTrainedConfig) -> dict[str, Any] | None:
    parameters = getattr(config, "rope_parameters", None)
    return dict(parameters) if parameters else None


def origin(config: PreTrainedConfig) -> Path | None:
    """The local folder that a model with this configuration was loaded from, the hub's cache included, if known."""
    return local_folder(getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None))


def local_folder(source: str, revision: str | None = None) -> Path | None:
    """The folder that `source` names: itself, or where the hub's cache keeps that id. Nothing is downloaded."""
    if not source:
        return None
    # Of a name that no file can have, too: an importer's input says what it likes.
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def memory_digest(model: PreTrainedModel) -> str:
    """BLAKE3 over every backbone tensor in memory, to compare before and after training. Not the stored digest.

    Of a backbone that is spread over processes, over this one's part.
    """
    tree = blake3()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("prefixkit."):
            tree.update(name.encode())
            own: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            tree.update(own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"b3m-v1:{tree.hexdigest()}"
