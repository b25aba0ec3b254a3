"""How many numbers are trained on the papers' own backbones, none of which is built for it."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, RobertaConfig, ViTConfig

from prefixkit.backbones.deltas import biases, normalizations
from prefixkit.backbones.geometry import measure
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods import bitfit, p_tuning_v2, visual_prompt_tuning
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.methods.with_head import WithHead
from tests.invariants.large import encoder_of, material

BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
VIT_BASE = ViTConfig()
VIT_LARGE = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("length", "numbers"), [(5, 245_760), (10, 491_520)])
def test_prefix_tuning_on_gpt2_medium(length: int, numbers: int) -> None:
    """P · L · 2 · d: Li & Liang 2021 have 250K for table-to-text, 0.1 % of GPT-2 medium."""
    with torch.device("meta"):
        model = GPT2LMHeadModel._from_config(GPT2_MEDIUM, attn_implementation="eager").eval()
        layers = measure(model, "gpt2-medium")
    shape = KeyValuePrefix(
        keys=tuple(torch.zeros(layer.kv_heads, length, layer.key_dim) for layer in layers),
        values=tuple(torch.zeros(layer.kv_heads, length, layer.value_dim) for layer in layers),
        positions=Positions(text_start=length),
    )
    assert count(PrefixTuning(shape)) == numbers


@pytest.mark.parametrize(
    ("config", "length", "numbers"),
    [(BERT_LARGE, 20, 983_040), (ROBERTA_LARGE, 8, 393_216), (ROBERTA_LARGE, 11, 540_672)],
)
def test_p_tuning_v2(config: PreTrainedConfig, length: int, numbers: int) -> None:
    """P · L · 2 · d: lengths of the official scripts for RTE, BoolQ and CoNLL03; and the head's d · C + C."""
    settings = p_tuning_v2.Settings(length=length, init="normal")
    method = p_tuning_v2.make(settings, material(encoder_of(config)))
    assert method().positions == Positions(text_start=length)
    assert count(method) == length * config.num_hidden_layers * 2 * config.hidden_size == numbers
    head = WithHead(method, outputs=2, hidden=config.hidden_size, reads="first")
    assert count(head) == numbers + 2 * config.hidden_size + 2


def test_p_tuning_v2_with_its_mlp() -> None:
    """Embedding(P, d), Linear(d, 512), Linear(512, 2 L d), as the code's `prefix_projection`."""
    settings = p_tuning_v2.Settings(length=4, init="normal", reparameterization="mlp")
    method = p_tuning_v2.make(settings, material(encoder_of(BERT_BASE)))
    width = 12 * 2 * 768
    assert count(method) == 4 * 768 + (768 * 512 + 512) + (512 * width + width)


@pytest.mark.parametrize(
    ("config", "depth", "numbers"),
    [(VIT_BASE, "deep", 92_160), (VIT_BASE, "shallow", 7_680), (VIT_LARGE, "deep", 245_760)],
)
def test_visual_prompt_tuning(config: ViTConfig, depth: str, numbers: int) -> None:
    """p · D · L, and p · D where shallow; drawn within Xavier's bound of the patch embedding, √(6 / (3·h·w + D))."""
    settings = visual_prompt_tuning.Settings(depth=depth)
    method = visual_prompt_tuning.make(settings, material(encoder_of(config)))
    bound = sqrt(6 / (3 * 16 * 16 + config.hidden_size))
    assert count(method) == numbers
    assert 0.99 * bound < method.rows.abs().max() <= bound
    assert method.rows.std().item() == pytest.approx(bound / sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    "config", [BERT_BASE, BERT_LARGE, ROBERTA_LARGE, VIT_BASE], ids=lambda config: config.model_type
)
def test_bitfit(config: PreTrainedConfig) -> None:
    """A layer has 11 d biases: four of attention, 4 d + d of its MLP, and two of its normalisations.

    Before the layers, text has one of a normalisation, and an image one of its patches, and one of a normalisation at
    the end. The head over words has 2 d and one a word.
    """
    width, text = config.hidden_size, hasattr(config, "vocab_size")
    backbone, inside = encoder_of(config), 11 * width * config.num_hidden_layers + (width if text else 2 * width)
    method = bitfit.make(bitfit.Settings(), material(backbone))
    assert count(method) == inside
    head = 2 * width + config.vocab_size if text else 0
    assert count(bitfit.make(bitfit.Settings(), material(backbone, writes=True))) == inside + head
    assert all(name.endswith(".bias") for name in method.names)
    alone = bitfit.make(bitfit.Settings(parameters="layernorm"), material(backbone))
    assert count(alone) == 2 * width * (2 * config.num_hidden_layers + 1)


def test_bitfit_on_gpt2_medium() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2_MEDIUM)
    assert sum(bias.numel() for bias in biases(model).values()) == 11 * 1024 * 24 + 1024
    assert sum(weight.numel() for weight in normalizations(model).values()) == 2 * 1024 * (2 * 24 + 1)


def test_standard_normal_starts_are_standard_normal() -> None:
    settings = p_tuning_v2.Settings(length=8, init="normal")
    drawn = [p_tuning_v2.make(settings, material(encoder_of(BERT_BASE), seed=seed))() for seed in (0, 0, 1)]
    one, again, other = (torch.cat([*prefix.keys, *prefix.values]) for prefix in drawn)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.mean().item() == pytest.approx(0.0, abs=0.01)
    assert one.std().item() == pytest.approx(1.0, abs=0.01)


def test_a_new_head_is_small_and_has_no_bias() -> None:
    head = WithHead(None, outputs=100, hidden=768, reads="first")
    assert head.head_weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not head.head_bias.any()
