"""Loading a backbone from a folder or a hub id, frozen, and refusing what cannot work before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.backbones.encoder_layers import measure_encoder
from prefixkit.backbones.geometry import is_encoder, measure, refuse_unsupported, refuse_untried
from prefixkit.backbones.identity import identify
from prefixkit.backbones.stacks import measure_stacks
from prefixkit.backbones.vision import VisionEncoder
from prefixkit.errors import BackboneError, ConfigError, FormatError
from prefixkit.format.digest import read_config, weight_files
from prefixkit.format.header import read_header
from prefixkit.format.manifest import LayerGeometry

_FILES = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_REASONS = {
    "LocalEntryNotFoundError": "no copy in the cache and no connection",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "GatedRepoError": "a repository that asks for a login",
    "RevisionNotFoundError": "no such revision",
    "HFValidationError": "no valid id",
}


def load_backbone(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32", revision: str | None = None
) -> Decoder | EncoderDecoder | Encoder:
    """A frozen model of any kind from a folder in `transformers` format or from a hub id.

    An encoder keeps the head of its masked language model where the folder has one. Other heads, and poolers, are left
    behind: a file's own head reads the final states.

    Args:
        source: a folder with config.json and safetensors weights, or a hub id such as `openai-community/gpt2`.
        device: where to put the weights.
        dtype: what to compute in: `float32`, `bfloat16`, `float16`.
        revision: a hub revision.

    Raises:
        BackboneError: no such folder or id, no weights, or an architecture that cannot take a prefix.
        ConfigError: another dtype.
    """
    folder, config = _described(source, dtype, revision)
    if is_encoder(config) and config.get_text_config() is config:
        return _encoder(source, folder, config, dtype, device, revision)
    if not _is_pair(config):
        return _decoder(source, folder, config, dtype, device, revision)
    refuse_untried(config, str(source))
    model = _frozen(folder, config, dtype, device)
    stacks = measure_stacks(model, str(source))
    name = _name(source, folder)
    identity = identify(folder, name, revision, config, stacks["decoder"], encoder=stacks["encoder"])
    return EncoderDecoder(model, folder, identity)


def load_decoder(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32", revision: str | None = None
) -> Decoder:
    """`load_backbone` where only a decoder will do; anything else is refused before its weights are read."""
    folder, config = _described(source, dtype, revision)
    return _decoder(source, folder, config, dtype, device, revision)


def _described(source: str | Path, dtype: str, revision: str | None) -> tuple[Path, PreTrainedConfig]:
    if dtype not in _DTYPES:
        raise ConfigError("dtype", expected=", ".join(_DTYPES), found=repr(dtype))
    folder = find_folder(source, revision)
    return folder, _config(folder)


def _decoder(
    source: str | Path,
    folder: Path,
    config: PreTrainedConfig,
    dtype: str,
    device: str | torch.device,
    revision: str | None,
) -> Decoder:
    refuse_unsupported(config, str(source))
    model = _frozen(folder, config, dtype, device)
    geometry = measure(model, str(source))
    return Decoder(model, folder, identify(folder, _name(source, folder), revision, config, geometry), geometry)


def _encoder(
    source: str | Path,
    folder: Path,
    config: PreTrainedConfig,
    dtype: str,
    device: str | torch.device,
    revision: str | None,
) -> Encoder:
    model = _frozen(folder, config, dtype, device)
    geometry = measure_encoder(model)
    identity = identify(folder, _name(source, folder), revision, config, (), encoder=geometry)
    kind = VisionEncoder if model.main_input_name == "pixel_values" else Encoder
    return kind(model, folder, identity, geometry)


def _frozen(folder: Path, config: PreTrainedConfig, dtype: str, device: str | torch.device) -> PreTrainedModel:
    model = _model(folder, config, _DTYPES[dtype]).to(device)
    return model.eval().requires_grad_(False)


def _is_pair(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _name(source: str | Path, folder: Path) -> str:
    return folder.name if Path(source).is_dir() else str(source)


def sketch(folder: Path) -> tuple[PreTrainedConfig, tuple[LayerGeometry, ...]]:
    """The configuration of the backbone in `folder` and its geometry, from config.json alone.

    Raises:
        BackboneError: no such configuration, or an architecture that cannot take a prefix.
    """
    config = _config(folder)
    refuse_unsupported(config, str(folder))
    # "meta" holds no numbers: nothing is allocated, sdpa cannot look at masks, experts are grouped in bfloat16 only.
    try:
        with torch.device("meta"):
            own = deepcopy(config)
            model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16, attn_implementation="eager")
    except Exception as error:  # each model class raises its own types
        where = folder / "config.json"
        raise BackboneError(where, expected="a configuration that makes a model", found=_told(error)) from error
    return config, measure(model, str(folder))


def find_folder(source: str | Path, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir() and source != "":
        return path.resolve()
    if path.exists() or path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        found = "a file" if path.is_file() else "nothing"
        raise BackboneError(
            source or "backbone",
            expected="a folder with config.json and model.safetensors",
            found=found,
            next_step="check the path",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises many unrelated types: offline, no such id, gated
        raise BackboneError(
            source,
            expected="a folder or a hub id that can be reached",
            found=_HUB_REASONS.get(type(error).__name__, type(error).__name__),
            next_step="check the spelling and the network, or give a local folder",
        ) from error


def _config(folder: Path) -> PreTrainedConfig:
    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # every configuration class raises its own types
        step = "check it, or upgrade transformers"
        raise BackboneError(
            folder / "config.json", expected="a model configuration", found=_told(error), next_step=step
        ) from error


def _model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    _check_files(folder)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": _attention(config)}
    kind = _class(config)
    model, told = _read(folder, kind, {**options, **_without_pooler(kind, config)})
    if told["missing_keys"] and kind is AutoModelForMaskedLM:
        # The head of a masked language model is more than every encoder's folder has.
        model, told = _read(folder, AutoModel, {**options, **_without_pooler(AutoModel, config)})
    if told["mismatched_keys"]:
        name, stored, needed = sorted(told["mismatched_keys"])[0]
        expected, found = f"weights that fit config.json, such as {name} {list(needed)}", f"{list(stored)}"
        raise BackboneError(folder, expected=expected, found=found)
    if told["missing_keys"]:
        names = ", ".join(sorted(told["missing_keys"])[:3])
        raise BackboneError(folder, expected="every weight of the model", found=f"none for {names}")
    assert isinstance(model, PreTrainedModel)
    return model


def _class(config: PreTrainedConfig) -> Any:
    if _is_pair(config):
        return AutoModelForSeq2SeqLM
    if not is_encoder(config):
        return AutoModelForCausalLM
    return AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModel


def _without_pooler(kind: Any, config: PreTrainedConfig) -> dict[str, Any]:
    # Folders without one would get a random one.
    parameters = signature(MODEL_MAPPING[type(config)].__init__).parameters if kind is AutoModel else {}
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def _read(folder: Path, kind: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        with _quietly():
            model, told = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
            )
    except Exception as error:  # quantised weights, damaged configurations: each model class raises its own types
        raise BackboneError(folder, expected="weights that fit config.json", found=_told(error)) from error
    return model, told


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the reports of `transformers` on missing and unused weights, which are judged here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _check_files(folder: Path) -> None:
    """Refuse missing and damaged weights before a model is built for them."""
    try:
        for file in weight_files(folder):
            read_header(file)
    except FormatError as error:
        step = "download the model again"
        raise BackboneError(error.where, expected=error.expected, found=error.found, next_step=step) from error


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _attention(config: PreTrainedConfig) -> str:
    # transformers refuses sdpa where logits are soft-capped or biased inside attention.
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if _class(config)._model_mapping[type(config)]._supports_sdpa and not softcap else "eager"
