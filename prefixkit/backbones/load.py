"""Loading a backbone from a folder or a hub id, frozen, and refusing what cannot work before its weights are read."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.backbones.encoder_layers import measure_encoder
from prefixkit.backbones.geometry import (
    is_encoder,
    measure,
    refuse_unsupported,
    refuse_untried,
    refuse_untried_images,
)
from prefixkit.backbones.identity import identify
from prefixkit.backbones.stacks import measure_stacks
from prefixkit.backbones.vision import VisionEncoder
from prefixkit.backbones.weights import Reading, frozen_model, in_a_line, is_pair
from prefixkit.errors import BackboneError, ConfigError
from prefixkit.format.digest import read_config
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
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    quantize: str | None = None,
    revision: str | None = None,
) -> Decoder | EncoderDecoder | Encoder:
    """A frozen model of any kind from a folder in `transformers` format or from a hub id.

    An encoder keeps the head of its masked language model where the folder has one. Other heads, and poolers, are left
    behind: a file's own head reads the final states.

    Args:
        source: a folder with config.json and safetensors weights, or a hub id such as `openai-community/gpt2`.
        device: where to put the weights.
        dtype: what to compute in: `float32`, `bfloat16`, `float16`.
        quantize: `nf4` for linear layers of four bits a weight; see `prefixkit.backbones.quantization`.
        revision: a hub revision.

    Raises:
        BackboneError: no such folder or id, no weights, or an architecture that cannot take a prefix.
        ConfigError: another dtype, or weights that cannot be quantised here.
    """
    folder, config = _described(source, dtype, revision)
    reading = Reading(_DTYPES[dtype], device, quantize)
    if is_encoder(config) and config.get_text_config() is config:
        return _encoder(source, folder, config, reading, revision)
    if not is_pair(config):
        return _decoder(source, folder, config, reading, revision)
    refuse_untried(config, str(source))
    model = frozen_model(folder, config, reading)
    stacks = measure_stacks(model, str(source))
    name = _name(source, folder)
    identity = identify(folder, name, revision, config, stacks["decoder"], encoder=stacks["encoder"])
    return EncoderDecoder(model, folder, identity)


def load_decoder(
    source: str | Path, *, device: str | torch.device = "cpu", dtype: str = "float32", revision: str | None = None
) -> Decoder:
    """`load_backbone` where only a decoder will do; anything else is refused before its weights are read."""
    folder, config = _described(source, dtype, revision)
    return _decoder(source, folder, config, Reading(_DTYPES[dtype], device), revision)


def _described(source: str | Path, dtype: str, revision: str | None) -> tuple[Path, PreTrainedConfig]:
    if dtype not in _DTYPES:
        raise ConfigError("dtype", expected=", ".join(_DTYPES), found=repr(dtype))
    folder = find_folder(source, revision)
    return folder, _config(folder)


def _decoder(
    source: str | Path, folder: Path, config: PreTrainedConfig, reading: Reading, revision: str | None
) -> Decoder:
    refuse_unsupported(config, str(source))
    model = frozen_model(folder, config, reading)
    geometry = measure(model, str(source))
    return Decoder(model, folder, identify(folder, _name(source, folder), revision, config, geometry), geometry)


def _encoder(
    source: str | Path, folder: Path, config: PreTrainedConfig, reading: Reading, revision: str | None
) -> Encoder:
    refuse_untried_images(config, str(source))
    model = frozen_model(folder, config, reading)
    geometry = measure_encoder(model)
    identity = identify(folder, _name(source, folder), revision, config, (), encoder=geometry)
    kind = VisionEncoder if model.main_input_name == "pixel_values" else Encoder
    return kind(model, folder, identity, geometry)


def _name(source: str | Path, folder: Path) -> str:
    return folder.name if Path(source).is_dir() else str(source)


def sketch(folder: Path) -> tuple[PreTrainedConfig, tuple[LayerGeometry, ...]]:
    """The configuration of the decoder in `folder` and its geometry, from config.json alone.

    Raises:
        BackboneError: no such configuration, or an architecture that cannot take a prefix.
    """
    config = _config(folder)
    refuse_unsupported(config, str(folder))
    return config, measure(_outlined(AutoModelForCausalLM, config, folder), str(folder))


def sketch_stacks(folder: Path) -> tuple[PreTrainedConfig, dict[str, tuple[LayerGeometry, ...]]]:
    """`sketch` for encoder-decoders too: the geometry of `decoder` and, where there is one, of `encoder`."""
    config = _config(folder)
    if not is_pair(config):
        return config, {"decoder": sketch(folder)[1]}
    refuse_untried(config, str(folder))
    return config, measure_stacks(_outlined(AutoModelForSeq2SeqLM, config, folder), str(folder))


def _outlined(kind: Any, config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """A model without numbers: "meta" holds none."""
    # There nothing is allocated, sdpa cannot look at masks, experts are grouped in bfloat16 only.
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(
                deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
            )
    except Exception as error:  # each model class raises its own types
        where = folder / "config.json"
        raise BackboneError(where, expected="a configuration that makes a model", found=in_a_line(error)) from error
    return model


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
            folder / "config.json", expected="a model configuration", found=in_a_line(error), next_step=step
        ) from error
