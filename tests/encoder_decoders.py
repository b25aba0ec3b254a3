"""Tiny random encoder-decoders, and their oracle: attention written out by hand, in the place of the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from prefixkit.backbones.encoder_decoder import NO_POSITIONS, EncoderDecoder
from prefixkit.backbones.stacks import measure_stacks
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes
from tests.architectures import VOCAB
from tests.small_tokenizer import small_backend, write_folder

Place = tuple[str, str]
END = 3
"""<|im_end|> in the tests' tokenizer, whose <s> is 1."""
_T5 = {
    "vocab_size": VOCAB,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": END,
    # Tied random models repeat what they read, whatever they receive.
    "tie_word_embeddings": False,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
    "decoder_start_token_id": END,
    "forced_eos_token_id": END,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bart": lambda: BartConfig(**_BART, decoder_layers=2),
    "t5": lambda: T5Config(**_T5, d_model=64, d_kv=16),
    # As flan-T5 small has it: a gated activation, and heads that together are wider than the model.
    "flan": lambda: T5Config(**_T5, d_model=48, d_kv=16, feed_forward_proj="gated-gelu"),
    "t5_uneven": lambda: T5Config(
        **{**_T5, "num_layers": 3, "tie_word_embeddings": True}, num_decoder_layers=2, d_model=64, d_kv=16
    ),
    # As DistilBART: fewer layers in the decoder.
    "bart_uneven": lambda: BartConfig(**{**_BART, "encoder_layers": 3, "tie_word_embeddings": True}, decoder_layers=2),
}


def tiny(family: str, seed: int = 0, implementation: str = "sdpa") -> PreTrainedModel:
    """A random model with weights large enough that attention matters, in eval mode, float32."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[family](), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0 if family.startswith("bart") else 1.5)
        if family in ("t5", "flan"):
            model.lm_head.weight.mul_(0.1)
    # What hub checkpoints of BART bring along, and nobody asked for here.
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.forced_bos_token_id = 7
    return model


def to_double(model: PreTrainedModel) -> PreTrainedModel:
    """`model` in float64 throughout: T5's own norm rounds its variance to float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "T5LayerNorm":
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def folder_of(family: str, path: Path, seed: int = 0) -> Path:
    """A folder with a tiny model of `family` and a tokenizer with its habits: BART's puts a BOS before a text."""
    model = tiny(family, seed)
    model.save_pretrained(path)
    bart = family.startswith("bart")
    names = {"eos_token": "<|im_end|>", **({"bos_token": "<s>"} if bart else {})}
    return write_folder(path, small_backend(adds_bos=bart), tokenizer_config=names)


def wrap(model: PreTrainedModel) -> EncoderDecoder:
    stacks = measure_stacks(model, "tiny")
    identity = BackboneIdentity(
        name="tiny",
        family=model.config.model_type,
        hidden_size=model.config.d_model,
        vocab_size=VOCAB,
        context_length=getattr(model.config, "max_position_embeddings", None),
        dtype="float32",
        config_hash=None,
        weights_hash=None,
        tokenizer_hash=None,
        stacks=stacks,
    )
    return EncoderDecoder(model, Path(), identity)


def random_prefixes(
    backbone: EncoderDecoder, length: int = 6, places: tuple[Place, ...] = ATTENTIONS
) -> KeyValuePrefixes:
    """Prefixes for `places` that fit `backbone` and mean nothing."""
    generator, parts = torch.Generator().manual_seed(1), []

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(heads, length, dim, generator=generator).to(backbone.model.dtype)

    for stack, attention in places:
        layers = backbone.identity.stacks[stack]
        parts.append(
            KeyValuePrefix(
                keys=tuple(draw(layer.kv_heads, layer.key_dim) for layer in layers),
                values=tuple(draw(layer.kv_heads, layer.value_dim) for layer in layers),
                positions=NO_POSITIONS,
                stack=stack,
                attention=attention,
            )
        )
    return KeyValuePrefixes(parts=tuple(parts))


def oracle(model: PreTrainedModel, prefixes: KeyValuePrefixes | None) -> PreTrainedModel:
    """A copy of `model` whose attention is `_by_hand`; which module is which, its name says."""
    copied = deepcopy(model)
    copied.set_attn_implementation("eager")
    parts = {(part.stack, part.attention): part for part in prefixes.parts} if prefixes is not None else {}
    for place, modules in _attentions(copied).items():
        for layer, module in enumerate(modules):
            pair = (parts[place].keys[layer], parts[place].values[layer]) if place in parts else None
            module.forward = _by_hand(module, pair)  # type: ignore[method-assign]
    return copied


def _attentions(model: PreTrainedModel) -> dict[Place, list[Any]]:
    names = {"self_attn": "self", "SelfAttention": "self", "encoder_attn": "cross", "EncDecAttention": "cross"}
    found: dict[Place, list[Any]] = {place: [] for place in ATTENTIONS}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in names:
            found["decoder" if "decoder." in name else "encoder", names[last]].append(module)
    return found


def _by_hand(module: Any, prefix: tuple[Tensor, Tensor] | None) -> Callable[..., Any]:
    t5 = hasattr(module, "q")
    query, key, value, out = _projections(module)
    heads = module.n_heads if t5 else module.num_heads

    def forward(hidden_states: Tensor, key_value_states: Tensor | None = None, **keywords: Any) -> Any:
        looked_at = hidden_states if key_value_states is None else key_value_states
        q, k, v = (_split(made, heads) for made in (query(hidden_states), key(looked_at), value(looked_at)))
        bias = keywords.get("position_bias")
        if t5 and bias is None:
            bias = q.new_zeros(1, heads, q.shape[2], k.shape[2])
            if module.has_relative_attention_bias:
                bias = module.compute_bias(q.shape[2], k.shape[2])
        mask = keywords.get("mask", keywords.get("attention_mask"))
        added = sum(part for part in (bias, mask) if part is not None)
        scores = q @ k.mT * (1.0 if t5 else q.shape[-1] ** -0.5) + added
        if prefix is not None:
            slots = q @ prefix[0].mT * (1.0 if t5 else q.shape[-1] ** -0.5)
            scores, v = torch.cat([slots, scores], -1), torch.cat([prefix[1].expand(len(v), -1, -1, -1), v], 2)
        weights = scores.softmax(-1)
        mixed = out((weights @ v).transpose(1, 2).flatten(2))
        return (mixed, bias, weights) if t5 else (mixed, weights)

    return forward


def _projections(module: Any) -> Iterator[nn.Module]:
    names = ("q", "k", "v", "o") if hasattr(module, "q") else ("q_proj", "k_proj", "v_proj", "out_proj")
    return (getattr(module, name) for name in names)


def _split(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
