"""Loading a backbone from a folder or a hub id, frozen, and refusing what cannot work before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import measure, refuse_unsupported
from prefixkit.backbones.identity import identify
from prefixkit.errors import BackboneError

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load_backbone(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32", revision: str | None = None
) -> Decoder:
    """A frozen decoder from a folder in `transformers` format or from a hub id.

    Args:
        source: a folder with config.json and safetensors weights, or a hub id such as `openai-community/gpt2`.
        device: where to put the weights.
        dtype: what to compute in: `float32`, `bfloat16`, `float16`.
        revision: a hub revision.

    Raises:
        BackboneError: no such folder or id, no weights, or an architecture that cannot take a prefix.
    """
    folder = _folder(source, revision)
    config = _config(folder)
    refuse_unsupported(config, str(source))
    model = _model(folder, config, getattr(torch, dtype)).to(device)
    model.eval().requires_grad_(False)
    geometry = measure(model, str(source))
    name = folder.name if Path(source).is_dir() else str(source)
    return Decoder(model, folder, identify(folder, name, revision, config, geometry), geometry)


def _folder(source: str | Path, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file() or path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        found = "a file" if path.is_file() else "nothing"
        raise BackboneError(source, expected="a folder with config.json and model.safetensors", found=found)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises many unrelated types: offline, no such id, gated
        raise BackboneError(
            source,
            expected="a folder or a hub id that can be reached",
            found=f"{type(error).__name__}",
            next_step="check the spelling and the network, or give a local folder",
        ) from error


def _config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        step = "give the folder of a transformers model"
        raise BackboneError(folder, expected="config.json", found="none", next_step=step)
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise BackboneError(folder / "config.json", expected="a model configuration", found=reason) from error


def _model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if not any(folder.glob("*.safetensors")):
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
        raise BackboneError(
            folder,
            expected="weights in model.safetensors",
            found=others,
            next_step="save the model again with save_pretrained",
        )
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": _attention(config)}
    try:
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise BackboneError(folder, expected="weights that fit config.json", found=reason) from error
    if told["missing_keys"]:
        names = ", ".join(sorted(told["missing_keys"])[:3])
        raise BackboneError(folder, expected="every weight of the model", found=f"none for {names}")
    assert isinstance(model, PreTrainedModel)
    return model


def _attention(config: PreTrainedConfig) -> str:
    # transformers refuses sdpa where logits are soft-capped or biased inside attention.
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap or config.model_type == "bloom" else "sdpa"
