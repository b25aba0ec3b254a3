"""Weights of four bits each: NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Only the weights of linear layers are quantised, all but the output layer's. They are made floats again wherever they
are multiplied: what is trained, and everything that is computed, stays in float, and gradients are those of a model
with the rounded weights. (Eight bits are not offered: bitsandbytes rounds the activations there too, and its gradient
is that of another function than its result.)
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from prefixkit.errors import BackboneError, ConfigError

KINDS = ("nf4",)


def quantized(kind: str, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """What `from_pretrained` is to be told, to read weights and round them.

    Raises:
        ConfigError: another kind, or bitsandbytes is not there.
    """
    if kind not in KINDS:
        raise ConfigError("--quantize", expected=", ".join(KINDS), found=repr(kind))
    if find_spec("bitsandbytes") is None:
        step = "pip install 'prefixkit[quantized]'"
        raise ConfigError("--quantize", expected="the package bitsandbytes", found="none", next_step=step)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def settle(model: nn.Module, where: object) -> None:
    """Let quantised layers stay what they are: bitsandbytes repacks them for inference, and gradients end there.

    On processors with AVX512-BF16 it does so in any pass without gradients in eval mode, rounds on the way, and never
    goes back.

    Raises:
        BackboneError: no layer was quantised.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    if not layers:
        raise BackboneError(where, expected="linear layers to quantize", found="none", next_step="leave --quantize out")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
