"""Tiny random encoders of text and of images, with weights large enough that attention matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    ViTConfig,
)

from tests.architectures import VOCAB
from tests.small_tokenizer import END, write_folder

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_TEXT: dict[str, Any] = {**_SHAPE, "vocab_size": VOCAB, "max_position_embeddings": 64}
_IMAGE: dict[str, Any] = {**_SHAPE, "image_size": 16, "patch_size": 8}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_TEXT),
    "roberta": lambda: RobertaConfig(**_TEXT, pad_token_id=1),
    "electra": lambda: ElectraConfig(**_TEXT, embedding_size=32),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=64,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=96,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    # One layer in four looks everywhere; the others at four tokens on each side.
    "modernbert": lambda: ModernBertConfig(
        **{name: value for name, value in _TEXT.items() if "dropout" not in name},
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
        cls_token_id=1,
        sep_token_id=3,
    ),
    "vit": lambda: ViTConfig(**_IMAGE),
    "deit": lambda: DeiTConfig(**_IMAGE),
    "dinov2": lambda: Dinov2Config(**_IMAGE),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**_IMAGE),
}
TEXT = ("bert", "roberta", "electra", "distilbert", "modernbert")


def tiny_encoder(family: str, head: Any = AutoModel, *, pooler: bool = True, **changes: Any) -> PreTrainedModel:
    """A two-layer random model of `family`, in eval mode, float32."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    options = {} if pooler else {"add_pooling_layer": False}
    model = head.from_config(config, attn_implementation="sdpa", **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(8.0)
    return model


def one_batch(family: str) -> dict[str, Tensor]:
    """Two inputs without padding: 9 tokens, or an image."""
    generator = torch.Generator().manual_seed(3)
    if family in TEXT:
        return {"input_ids": torch.randint(5, VOCAB, (2, 9), generator=generator)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def rows(family: str, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Three inputs alone: texts of 9, 5 and 12 tokens, two sentences each, or images."""
    generator = torch.Generator().manual_seed(4)
    if family not in TEXT:
        return [{"pixel_values": torch.randn(1, 3, 16, 16, generator=generator).to(dtype)} for _ in range(3)]
    texts = [torch.randint(5, VOCAB, (1, length), generator=generator) for length in (9, 5, 12)]
    for text in texts:
        text[0, 0], text[0, 2], text[0, -1] = CLS, SEP, SEP
    return [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts]


def together(inputs: list[dict[str, Tensor]], more: int = 0) -> dict[str, Tensor]:
    """One batch of `inputs`, padded on the right, `more` slots wider than the longest."""
    if "pixel_values" in inputs[0]:
        return {"pixel_values": torch.cat([each["pixel_values"] for each in inputs])}
    width = max(each["input_ids"].shape[1] for each in inputs) + more
    wider = {name: [F.pad(each[name], (0, width - each[name].shape[1])) for each in inputs] for name in inputs[0]}
    return {name: torch.cat(tensors) for name, tensors in wider.items()}


def spelled_out(family: str, inputs: dict[str, Tensor], start: int = 0) -> dict[str, Tensor]:
    """`inputs` of one row with the positions that begin at `start`, and the types: 1 behind the first separator."""
    if family not in TEXT:
        return inputs
    ids = inputs["input_ids"]
    # RoBERTa numbers its tokens from behind its padding token.
    first = start + (2 if family == "roberta" else 0)
    types = {"token_type_ids": (torch.arange(ids.shape[1]) > 2).long()[None]} if family in TYPED else {}
    return {**inputs, "position_ids": torch.arange(first, first + ids.shape[1])[None], **types}


TYPED = ("bert", "roberta", "electra")
"""Families that tell a second sentence from the first."""
CLS, MASK, SEP = 1, 2, 3
"""Ids of the tests' tokenizer."""
SPECIAL = {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "<|im_end|>", "mask_token": "<|im_start|>"}
"""What the tests' tokenizer calls its special tokens on an encoder."""


def encoder_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A folder with a tiny encoder: of text with a masked language model's head and a tokenizer, or of images."""
    text = family in TEXT
    tiny_encoder(family, AutoModelForMaskedLM if text else AutoModel, **changes).save_pretrained(folder)
    if text:
        write_folder(folder, tokenizer_config={**SPECIAL, "eos_token": "<|im_end|>", "pad_token": END})
    else:
        prepared = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder
