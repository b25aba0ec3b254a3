"""The weights of a backbone's folder as a frozen model, judged: nothing missing, nothing random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from prefixkit.backbones.geometry import is_encoder
from prefixkit.backbones.quantization import quantized, settle
from prefixkit.errors import BackboneError, FormatError
from prefixkit.format.digest import weight_files
from prefixkit.format.header import read_header


@dataclass(frozen=True)
class Reading:
    """How weights are read.

    Attributes:
        dtype: what to compute in.
        device: where to put them.
        quantize: one of `prefixkit.backbones.quantization.KINDS`; None keeps them as they are.
    """

    dtype: torch.dtype
    device: str | torch.device
    quantize: str | None = None

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is to be told. Raises ConfigError for what cannot be quantised here."""
        return {"dtype": self.dtype, **(quantized(self.quantize, self.dtype, self.device) if self.quantize else {})}


def is_pair(config: PreTrainedConfig) -> bool:
    """Whether a model with this configuration is an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def frozen_model(folder: Path, config: PreTrainedConfig, reading: Reading) -> PreTrainedModel:
    """The model in `folder`, without gradients, in eval mode: with a language model's head where it has one.

    Raises:
        BackboneError: weights that are damaged, missing or of other shapes.
        ConfigError: they cannot be quantised here.
    """
    _check_files(folder)
    options: dict[str, Any] = {**reading.options(), "attn_implementation": _attention(config)}
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
    if reading.quantize:
        settle(model, folder)
    return model.to(reading.device).eval().requires_grad_(False)


def _class(config: PreTrainedConfig) -> Any:
    if is_pair(config):
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
        raise BackboneError(folder, expected="weights that fit config.json", found=in_a_line(error)) from error
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


def in_a_line(error: Exception) -> str:
    """What `error` says, in a line that is not too long."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _attention(config: PreTrainedConfig) -> str:
    # transformers refuses sdpa where logits are soft-capped or biased inside attention.
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if _class(config)._model_mapping[type(config)]._supports_sdpa and not softcap else "eager"
