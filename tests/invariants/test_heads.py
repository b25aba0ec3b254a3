"""Heads: what they read of ragged batches, what moves them, and that a file holds all that decides their answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.heads import read
from prefixkit.backbones.load import load_backbone
from prefixkit.data.labelled_batches import LabelledBatch
from prefixkit.format.manifest import Manifest, Provenance
from prefixkit.injections import Combined, Injection, TaskHead, injection, part_of, records_of
from prefixkit.prefix import Prefix, load, save
from prefixkit.training.reading import answer_loss
from tests.encoders import CONFIGS, TEXT, encoder_folder, rows, tiny_encoder, together
from tests.invariants.attention import random_prefix
from tests.ragged import padded, prompts

Load = Callable[..., Encoder]
Folder = Callable[..., Path]
TOLERANCE = 1e-5
READS = ("first", "last", "mean", "each")


def drawn(reads: str, hidden: int = 64) -> TaskHead:
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(3, hidden, generator=generator) * 0.1, torch.randn(3, generator=generator)
    return TaskHead(weight=weight, bias=bias, reads=reads)


def by_hand(head: TaskHead, states: Tensor, *, image: bool) -> Tensor:
    """Of one row's real states [seq, hidden]; an image's mean is that of what stands behind its class token."""
    chosen = {
        "first": states[0],
        "last": states[-1],
        "mean": (states[1:] if image else states).mean(dim=0),
        "each": states,
    }[head.reads]
    return chosen @ head.weight.T + head.bias


@torch.no_grad()
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("family", CONFIGS)
def test_heads_of_encoders_read_each_row_as_if_alone(encoder: Load, family: str, reads: str) -> None:
    backbone, inputs, head = encoder(family), rows(family), drawn(reads)
    batch = together(inputs, more=3)
    found = read(head, backbone.states(batch), batch.get("attention_mask"))
    for index, row in enumerate(inputs):
        expected = by_hand(head, backbone.states(row)[0], image=family not in TEXT)
        own = found[index, : len(expected)] if reads == "each" else found[index]
        assert (own - expected).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2"])
def test_heads_of_decoders_read_each_row_as_if_alone(backbone_folder: Folder, family: str, reads: str) -> None:
    """Behind the last normalisation, which is what their own heads read."""
    backbone, head, texts = load_backbone(backbone_folder(family)), drawn(reads), prompts()
    batch = padded(texts, side="right")
    found = read(head, backbone.states(batch), batch["attention_mask"])
    model = backbone.release()
    for index, text in enumerate(texts):
        states = model.get_decoder()(input_ids=text[None]).last_hidden_state[0]
        expected = by_hand(head, states, image=False)
        own = found[index, : len(expected)] if reads == "each" else found[index]
        assert (own - expected).abs().max() <= TOLERANCE
        logits = model(input_ids=text[None]).logits[0]
        soft = getattr(model.config, "final_logit_softcapping", None)
        words = model.get_output_embeddings()(states)
        assert (logits - (words if soft is None else soft * torch.tanh(words / soft))).abs().max() <= TOLERANCE


@pytest.mark.parametrize("reads", ["first", "mean", "each"])
def test_the_gradient_of_a_head_is_that_of_a_linear_softmax(encoder: Load, reads: str) -> None:
    """(softmax - one-hot)ᵀ states, summed over all that is labelled; what is labelled -100 counts for nothing."""
    backbone, batch = encoder("bert"), together(rows("bert"))
    labels = torch.tensor([2, 0, 1])
    if reads == "each":
        labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 3, -100)
        labels[:, 0] = -100
    head = drawn(reads)
    learning = replace(head, weight=head.weight.requires_grad_(), bias=head.bias.requires_grad_())
    answer_loss(backbone, LabelledBatch(batch, labels), learning).backward()
    with torch.no_grad():
        states = backbone.states(batch).double()
        mask = batch["attention_mask"][..., None].double()
        chosen = {"first": states[:, 0], "mean": (states * mask).sum(1) / mask.sum(1), "each": states[labels != -100]}
        outputs = chosen[reads] @ head.weight.double().T + head.bias.double()
        wrong = outputs.softmax(-1) - F.one_hot(labels[labels != -100], 3)
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    assert (head.weight.grad - wrong.T @ chosen[reads]).abs().max() <= TOLERANCE
    assert (head.bias.grad - wrong.sum(0)).abs().max() <= TOLERANCE


def kept(backbone: Backbone, received: Injection, path: Path) -> Injection:
    """`received` through a file."""
    provenance = Provenance(method="p-tuning-v2", prefixkit="0")
    manifest = Manifest(backbone=backbone.identity, injections=records_of(received), provenance=provenance)
    save(Prefix(manifest, received.arrays()), path)
    return injection(load(path))


@torch.no_grad()
def answered(backbone: Backbone, received: Injection, batch: dict[str, Tensor]) -> Tensor:
    head = part_of(received, TaskHead)
    assert head is not None
    return read(head, backbone.states(batch, received), batch.get("attention_mask"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bert", "electra", "vit"])
def test_a_file_answers_as_what_it_was_made_of(encoder: Load, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, also where its numbers were rounded when it was made."""
    backbone, batch = encoder(family), together(rows(family))
    prefix, head = random_prefix(backbone, offset=family in TEXT), drawn("first")
    prefix = replace(
        prefix,
        keys=tuple(key.to(dtype) for key in prefix.keys),
        values=tuple(value.to(dtype) for value in prefix.values),
    )
    received = Combined(parts=(prefix, replace(head, weight=head.weight.to(dtype), bias=head.bias.to(dtype))))
    stored = kept(backbone, received, tmp_path / "made")
    back = part_of(stored, TaskHead)
    assert back is not None
    assert back.weight.dtype == dtype
    assert torch.equal(answered(backbone, stored, batch), answered(backbone, received, batch))


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "bert of words"])
def test_nothing_that_decides_an_answer_is_random(family: str, tmp_path: Path) -> None:
    """A folder without a pooler, which `transformers` would draw anew at each load: the states know none."""
    name, _, words = family.partition(" ")
    folder = encoder_folder(name, tmp_path / name)
    if not words:
        tiny_encoder(name, AutoModel, pooler=False).save_pretrained(folder)
    answers, theirs = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        theirs.append(AutoModel.from_pretrained(folder).pooler.dense.weight)
        backbone = load_backbone(folder)
        assert not any("pooler" in name for name in backbone.model.state_dict())
        received = Combined(parts=(random_prefix(backbone, offset=name in TEXT), drawn("first")))
        answers.append(answered(backbone, received, together(rows(name))))
    assert torch.equal(*answers)
    assert not torch.equal(*theirs)
