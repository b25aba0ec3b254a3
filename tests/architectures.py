"""Tiny random decoders of every supported architecture, with weights large enough that attention matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 320
WINDOW = 16
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_ENDS,
}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        **_ENDS,
    ),
    "llama": lambda: LlamaConfig(**_LLAMA),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_LLAMA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
    "mistral_window": lambda: MistralConfig(**_LLAMA, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(**_LLAMA, head_dim=16, query_pre_attn_scalar=16, **_SLIDING),
    "gemma3": lambda: Gemma3TextConfig(**_LLAMA, head_dim=16, query_pre_attn_scalar=16, **_SLIDING),
    "phi3": lambda: Phi3Config(**_LLAMA),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        dropout=0.0,
        **_ENDS,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        rotary_pct=0.5,
        **_ENDS,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        new_decoder_architecture=False,
        max_position_embeddings=128,
        alibi=False,
        **_ENDS,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, **_ENDS),
}


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A two-layer random model of `family`, in eval mode, float32; `changes` go into its configuration."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.update(changes)
    implementation = "eager" if family in ("gemma2", "bloom") else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model
