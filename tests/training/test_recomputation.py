"""Layers that are computed again in the backward pass: nothing changes but what is kept in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixkit.backbones.attention import KEYWORD, Injected
from prefixkit.backbones.recomputation import is_recomputed, layers_to_recompute, recompute
from prefixkit.errors import BackboneError
from prefixkit.injections import KeyValuePrefix
from prefixkit.training import loop
from prefixkit.training.preparation import Prepared
from prefixkit.training.sweep import sweep
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix
from tests.training.every_kind import PAIRS, prepared
from tests.training.test_loop import settings
from tests.training.test_sweep import given

Folder = Callable[..., Path]


def kept_by(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `work` gives, and the elements of all tensors that it leaves for a backward pass."""
    kept: dict[tuple[int, int], int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr(), tensor.numel()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = work()
    return made, sum(kept.values())


def loss_and_gradients(run: Prepared) -> tuple[Tensor, list[Tensor], int]:
    loss, kept = kept_by(lambda: run.objective(run.backbone, run.batches.batch(0), run.method()))
    found = torch.autograd.grad(loss, [weight for weight in run.method.parameters() if weight.requires_grad])
    return loss.detach(), list(found), kept


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_loss_and_gradients_of_every_method_are_the_same(method: str, family: str, tmp_path: Path) -> None:
    run = prepared(method, family, tmp_path)
    run.backbone.model.double()
    run.method.double()
    with torch.no_grad():
        for weight in run.method.parameters():
            weight += 0.05 * torch.randn_like(weight)  # deltas begin as zeros, which nobody would miss
    loss, gradients, kept = loss_and_gradients(run)
    recompute(run.backbone.model)
    again, others, fewer = loss_and_gradients(run)
    assert abs(loss - again) <= 1e-10
    for found, expected in zip(others, gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-10
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    # A probe's gradient goes through no layer.
    assert fewer < kept or method == "linear-probe"


def test_a_packed_row_gives_the_same(tmp_path: Path) -> None:
    run = prepared("prefix-tuning", "llama", tmp_path, layout="packed")
    run.backbone.model.double()
    run.method.double()
    loss, gradients, kept = loss_and_gradients(run)
    recompute(run.backbone.model)
    again, others, fewer = loss_and_gradients(run)
    assert abs(loss - again) <= 1e-10
    assert all((found - right).abs().max() <= 1e-10 for found, right in zip(others, gradients, strict=True))
    assert fewer < kept


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_an_encoder_does_not_forget_it(layout: str, tmp_path: Path) -> None:
    run = prepared("p-tuning-v2", "bert", tmp_path, layout=layout, gradient_checkpointing=True)
    run.backbone.key_values_of([5, 6])
    _, _, kept = loss_and_gradients(run)
    assert all(map(is_recomputed, layers_to_recompute(run.backbone.model)))
    run.backbone.release()
    assert kept < loss_and_gradients(run)[2]


def test_trials_side_by_side_end_the_same(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    asked = given(backbone_folder("llama"), records, steps=4)
    found = [
        sweep({**asked, "gradient_checkpointing": again}, {"seed": [0, 1]}, tmp_path / str(again))
        for again in (False, True)
    ]
    assert all(trial.shares for trial in found[1])
    for plain, recomputed in zip(*found, strict=True):
        assert Path(plain.prepared.config.output).read_bytes() == Path(recomputed.prepared.config.output).read_bytes()


def decoder_pass(family: str) -> tuple[Any, Callable[[], Tensor], list[Tensor]]:
    """A tiny decoder, a pass through it, and the prefix that it receives."""
    decoder = wrap(tiny(family).requires_grad_(False))
    batch, prefix = labelled(padded(prompts(), "right")), random_prefix(decoder.model)
    batch["labels"][:, 0] = -100
    leaves = [tensor.requires_grad_() for tensor in (*prefix.keys, *prefix.values)]
    return decoder, lambda: decoder.target_logits(**batch, prefix=prefix).logsumexp(-1).sum(), leaves


@pytest.mark.parametrize("family", CONFIGS)
def test_every_decoder_keeps_less_and_computes_its_layers_twice(family: str) -> None:
    decoder, forward, leaves = decoder_pass(family)
    loss, kept = kept_by(forward)
    expected = torch.autograd.grad(loss, leaves)
    recompute(decoder.model)
    passes: list[int] = []
    norm = next(module for module in decoder.model.modules() if isinstance(module, GradientCheckpointingLayer))
    norm = next(module for name, module in norm.named_modules() if "norm" in name or name.startswith("ln"))
    norm.register_forward_hook(lambda *_: passes.append(1))
    again, fewer = kept_by(forward)
    assert len(passes) == 1
    found = torch.autograd.grad(again, leaves)
    assert len(passes) == 2
    assert torch.equal(loss, again)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert fewer < 0.4 * kept


def test_a_second_pass_in_between_changes_nothing() -> None:
    decoder, forward, leaves = decoder_pass("llama")
    expected = torch.autograd.grad(forward(), leaves)
    recompute(decoder.model)
    loss = forward()
    with torch.no_grad():
        decoder.logits(prompts()[0][None], None, None)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, leaves), expected, strict=True))


def test_layers_that_lost_their_prefix_are_noticed() -> None:
    decoder, forward, leaves = decoder_pass("llama")
    lost: list[bool] = []

    def drop(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return (arguments, {**keywords, KEYWORD: Injected()}) if lost else None

    for layer in decoder.model.model.layers:
        layer.self_attn.register_forward_pre_hook(drop, with_kwargs=True)
    recompute(decoder.model)
    loss = forward()
    lost.append(True)
    with pytest.raises(CheckpointError):
        torch.autograd.grad(loss, leaves)


def test_a_run_writes_the_same_file(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    for name, checkpointing in (("kept", False), ("again", True)):
        loop.train(
            settings(backbone_folder("gpt2"), records, tmp_path / name, gradient_checkpointing=checkpointing, steps=3)
        )
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "again").read_bytes()


def test_it_is_done_once_only() -> None:
    decoder, _, _ = decoder_pass("gpt2")
    recompute(decoder.model)
    before = [layer.forward for layer in decoder.model.transformer.h]
    recompute(decoder.model)
    assert [layer.forward for layer in decoder.model.transformer.h] == before


def test_a_model_without_such_layers_is_refused() -> None:
    model = tiny("gpt2")
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(BackboneError, match="gpt2, which is made of none"):
        recompute(model)


def test_folding_a_prompt_leaves_its_keys_and_values() -> None:
    decoder = wrap(tiny("llama").requires_grad_(False))
    tokens = decoder.key_values_of([5, 6, 7])
    recompute(decoder.model)
    again = decoder.key_values_of([5, 6, 7])
    assert isinstance(again, KeyValuePrefix)
    assert all(torch.equal(*pair) for pair in zip(tokens.keys, again.keys, strict=True))
