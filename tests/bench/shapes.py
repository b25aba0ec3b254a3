"""What a training case gives every contender: a backbone in a folder, encoded examples, and the same settings."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefixkit.data.batches import EncodedExample, encode_examples
from prefixkit.data.readers import read_examples
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.task import load_task, load_tokenizer

GPT2_30M = {"model_type": "gpt2", "n_layer": 8, "n_embd": 512, "n_head": 8, "n_positions": 512, "vocab_size": 8192}
GPT2_MEDIUM = {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16, "vocab_size": 50257}
QWEN3_600M = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QWEN3_1700M = {**QWEN3_600M, "hidden_size": 2048, "intermediate_size": 6144}
LLAMA_100M = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 640,
    "intermediate_size": 2304,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LLAMA3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True)
class Setting:
    """What is the same for every contender; JSON carries it into a process of its own.

    Attributes:
        mean: tokens of an example, on average, lengths lognormal and half of each labels; None takes `data`.
        spread: of the logarithms of lengths: E2E's own examples have about 0.3, instructions and answers more.
        length: prefix slots.
        layout: of our batches.
        compile: whether ours are compiled.
        recompute: whether ours compute their layers again, to save memory.
        held_out: validation data, for the case that needs some.
    """

    backbone: str
    data: str
    batch_size: int
    mean: int | None = None
    spread: float = 0.5
    length: int = 16
    layout: str = "padded"
    compile: str = "auto"
    recompute: bool = False
    held_out: str = str(E2E / "valid.jsonl")
    device: str = "cpu"
    dtype: str = "float32"
    lr: float = 0.01
    seed: int = 0
    threads: int = 2

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the backbone computes in."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def config(self, output: Path) -> dict[str, Any]:
        """Our own run with this setting: a random start, so that no slot is frozen and peers can start there too."""
        return {
            "backbone": self.backbone,
            "data": self.data,
            "output": str(output),
            "task": "e2e",
            "steps": 1_000_000,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "layout": self.layout,
            "compile": self.compile,
            "gradient_checkpointing": self.recompute,
            "method": {"length": self.length, "init": "random"},
            "optimizer": {"lr": self.lr, "schedule": "constant"},
        }


def examples(setting: Setting) -> list[EncodedExample]:
    """What every contender trains on."""
    if setting.mean is not None:
        return _lognormal(setting.mean, setting.spread, setting.batch_size * 256, setting.seed)
    tokenizer = load_tokenizer(setting.backbone)
    task = load_task("e2e", tokenizer, max_length=512 - setting.length, kind="decoder")
    return encode_examples(task, tokenizer, read_examples(setting.data))


def _lognormal(mean: int, spread: float, count: int, seed: int) -> list[EncodedExample]:
    draw = np.random.default_rng(seed)
    lengths = np.exp(draw.normal(math.log(mean) - spread**2 / 2, spread, count)).round().clip(4, 6 * mean).astype(int)
    rows = (draw.integers(8192, size=length).tolist() for length in lengths)
    return [EncodedExample(tuple(row[: len(row) // 2]), tuple(row[len(row) // 2 :])) for row in rows]


def make_backbone(
    shape: Mapping[str, Any],
    folder: Path,
    dtype: str = "float32",
    seed: int = 0,
    *,
    weights: bool = True,
    device: str = "cpu",
) -> str:
    """Write random weights of `shape` to `folder`, with the tokenizer of the embedded backbone; or no weights.

    Dropout is off, as all contenders compute the same. The weights are drawn on `device`: billions take minutes on one
    core.
    """
    torch.manual_seed(seed)
    own = dict(shape)
    family = own.pop("model_type")
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    config = AutoConfig.for_model(family, **own, **dropout, bos_token_id=0, eos_token_id=0)
    if weights:
        with torch.device(device):
            made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        made.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BACKBONE / name, folder / name)
    return str(folder)
