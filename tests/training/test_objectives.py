"""Objectives: against sums by hand, and what a teacher teaches."""

from __future__ import annotations

import pytest
import torch

from prefixkit.data.batches import EncodedExample, collate
from prefixkit.training.objectives import Distillation, likeliest, next_token, soft_cross_entropy_sum
from tests.architectures import VOCAB, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import random_prefix

BATCH = collate([EncodedExample((5, 6, 7), (8, 9)), EncodedExample((11,), (12, 13, 14))])


def test_soft_cross_entropy_is_the_sum_over_the_most_likely_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(3, 10, generator=generator) for _ in range(2))
    expected = 0.0
    for row in range(3):
        shares = torch.softmax(teacher[row], 0)
        for token in shares.argsort(descending=True)[:4]:
            expected -= shares[token].item() * torch.log_softmax(logits[row], 0)[token].item()
    assert soft_cross_entropy_sum(logits, *likeliest(teacher, top=4)).item() == pytest.approx(expected, rel=1e-5)


def test_all_tokens_of_a_certain_teacher_are_the_plain_cross_entropy() -> None:
    logits, wanted = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 7, 3])
    certain = torch.full((4, 10), -1e4).scatter(1, wanted[:, None], 1e4)
    plain = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    assert soft_cross_entropy_sum(logits, *likeliest(certain)).item() == pytest.approx(plain.item(), rel=1e-6)


@torch.no_grad()
def test_next_token_is_the_sum_of_each_row_alone() -> None:
    decoder, expected = wrap(tiny("gpt2")), 0.0
    for ids, start in (([5, 6, 7, 8, 9], 3), ([11, 12, 13, 14], 1)):
        logits = torch.log_softmax(decoder.logits(torch.tensor([ids]))[0], -1)
        expected -= sum(logits[place - 1, ids[place]].item() for place in range(start, len(ids)))
    assert next_token(decoder, BATCH, None).item() == pytest.approx(expected, rel=1e-5)


def test_nobody_imitates_the_teacher_better_than_itself() -> None:
    decoder = wrap(tiny("gpt2"))
    teacher = random_prefix(decoder.model)
    learn = Distillation(teacher)
    own, bare = learn(decoder, BATCH, teacher).item(), learn(decoder, BATCH, None).item()
    assert own < bare - 0.1
    assert VOCAB > 20  # the most likely tokens are some of them, not all


def test_the_teacher_gets_no_gradient_and_the_pupil_does() -> None:
    decoder = wrap(tiny("gpt2").requires_grad_(False))
    teacher, pupil = random_prefix(decoder.model), random_prefix(decoder.model, seed=2)
    for tensor in (*teacher.keys, *pupil.keys):
        tensor.requires_grad_()
    Distillation(teacher)(decoder, BATCH, pupil).backward()
    assert all(key.grad is None for key in teacher.keys)
    assert all((key.grad.abs().sum(dim=(0, 2)) > 0).all() for key in pupil.keys if key.grad is not None)
    assert all(key.grad is not None for key in pupil.keys)
