"""Training with an attached prefix in the loops that people have: checkpointing, `Trainer`, accelerate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.snapshot import snapshot
from prefixkit.errors import BackboneError
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.prefix import load, save
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix

# transformers renamed it in 5.23; the old name works with every version that we accept.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")


def trained(family: str, reparameterization: str = "none", **checkpointing: Any) -> tuple[PreTrainedModel, nn.Module]:
    """A model in training mode with checkpointing, and the method attached to it."""
    model = tiny(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable(**checkpointing)
    torch.manual_seed(0)
    method = PrefixTuning(random_prefix(model), reparameterization=reparameterization, hidden=8, paper_start=True)
    return attach(model, method), method


def gradients(loss: Tensor, method: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(method.parameters())))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt"])
@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_gradient_checkpointing_changes_nothing(family: str, reparameterization: str) -> None:
    model, method = trained(family, reparameterization)
    expected = model(**labelled(padded(prompts()))).loss
    for options in (None, {"use_reentrant": False}):
        again, its_method = trained(family, reparameterization, gradient_checkpointing_kwargs=options)
        loss = again(**labelled(padded(prompts()))).loss
        assert loss.item() == expected.item()
        found = gradients(loss, its_method)
        assert same(found, gradients(model(**labelled(padded(prompts()))).loss, method))
        assert all(gradient.abs().max() > 0 for gradient in found)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_recomputed_layers_get_the_prefix_and_positions_of_their_own_pass(family: str) -> None:
    results = []
    for checkpointing in (False, True):
        decoder = wrap(tiny(family))
        decoder.model.train()
        if checkpointing:
            decoder.model.gradient_checkpointing_enable()
        method = PrefixTuning(random_prefix(decoder.model))
        batch = padded(prompts())
        loss = decoder.logits(**batch, prefix=method()).square().mean()
        with torch.no_grad():
            decoder.logits(prompts()[0][None], prefix=random_prefix(decoder.model, seed=9))
        results.append(gradients(loss, method))
    assert same(*results)


def test_reentrant_checkpointing_is_refused() -> None:
    model, _ = trained("llama", gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(BackboneError, match="use_reentrant=False under a prefix; found use_reentrant=True"):
        model(**labelled(padded(prompts())))


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_checkpointing_is_refused_where_it_drops_the_prefix(family: str) -> None:
    model, _ = trained(family, gradient_checkpointing_kwargs=None)
    with pytest.raises(BackboneError, match="found gradient checkpointing, which drops the cache"):
        model(**labelled(padded(prompts())))
    model.eval()
    model(**padded(prompts()))


def attached(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return attach(model, PrefixTuning(random_prefix(model)))


def trainer(model: PreTrainedModel, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        save_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=prompts() * 2, data_collator=lambda rows: labelled(padded(rows)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_trainer_trains_the_prefix_alone(family: str, backbone_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = attached(backbone_folder(family))
    weights, start = memory_digest(model), model.prefixkit.prefix.prefix.detach().clone()
    before = model(**labelled(padded(prompts()))).loss.item()
    trainer(model, tmp_path, gradient_checkpointing=family == "llama").train()
    assert model(**labelled(padded(prompts()))).loss.item() < before - 0.1
    assert memory_digest(model) == weights
    assert not torch.equal(model.prefixkit.prefix.prefix, start)

    model.eval()
    expected = model(**padded(prompts())).logits
    save(snapshot(model), tmp_path / "prefix.safetensors")
    fresh = AutoModelForCausalLM.from_pretrained(backbone_folder(family), dtype=torch.float32)
    attach(fresh, load(tmp_path / "prefix.safetensors"))
    assert torch.equal(fresh(**padded(prompts())).logits, expected)
    assert memory_digest(detach(model)) == weights


def test_trainer_resumes_bit_for_bit(backbone_folder: Callable[..., Path], tmp_path: Path) -> None:
    whole, parts = attached(backbone_folder("llama")), attached(backbone_folder("llama"))
    trainer(whole, tmp_path).train()
    trainer(parts, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(parts.prefixkit.prefix.prefix, whole.prefixkit.prefix.prefix)


def test_accelerate_prepares_and_steps(backbone_folder: Callable[..., Path]) -> None:
    accelerator = Accelerator(cpu=True)
    model = attached(backbone_folder("gpt2"))
    weights = memory_digest(model)
    loader = DataLoader(prompts() * 4, batch_size=3, collate_fn=lambda rows: labelled(padded(rows)))
    optimizer = torch.optim.AdamW(model.prefixkit.parameters(), lr=0.05)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert memory_digest(accelerator.unwrap_model(prepared)) == weights
