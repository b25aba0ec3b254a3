"""AutoPrompt: the gradient's ranking is exact where the loss is linear, and no step makes the loss worse."""

from __future__ import annotations

import pytest
import torch

from prefixkit.errors import ConfigError
from prefixkit.methods.autoprompt import AutoPrompt, Settings, make
from prefixkit.training.hotflip import HotFlip
from tests.methods.test_prompt_tuning import VOCABULARY, material

SMALL = VOCABULARY[:50]


def test_the_gradient_ranks_tokens_by_the_change_of_a_linear_loss() -> None:
    method = AutoPrompt([3, 4], SMALL, candidates=6)
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    (method().embeddings * weights).sum().backward()
    changes = torch.stack([((vector - SMALL[4]) * weights[1]).sum() for vector in SMALL])
    assert method.likely_better(1) == changes.argsort()[:6].tolist()


def test_excluded_tokens_are_never_chosen() -> None:
    best = AutoPrompt([0], SMALL, candidates=50)
    best().embeddings.sum().backward()
    first, *rest = best.likely_better(0)
    method = AutoPrompt([0], SMALL, candidates=50, excluded=[first])
    method().embeddings.sum().backward()
    assert method.likely_better(0) == rest


def test_no_step_makes_its_batch_worse_and_most_make_it_better() -> None:
    torch.manual_seed(0)
    method = AutoPrompt([1, 2, 3], SMALL, fixed=1)
    optimizer, goal = HotFlip(method, lr=1.0), SMALL[[1, 7, 9]]

    def loss() -> torch.Tensor:
        return (method().embeddings - goal).pow(2).sum()

    losses = [loss().item()]
    for _ in range(12):
        optimizer.zero_grad()
        loss().backward()
        left = optimizer.step(lambda: loss().item())
        losses.append(loss().item())
        assert left == losses[-1] <= losses[-2]
        assert torch.equal(method().embeddings, SMALL[list(method().token_ids or ())])
    assert losses[-1] < 0.6 * losses[0]
    assert method().token_ids is not None
    assert method().token_ids[0] == 1


def test_tokens_and_vectors_come_back_from_a_state_dict() -> None:
    one, other = AutoPrompt([1, 2], SMALL), AutoPrompt([3, 4], SMALL)
    other.load_state_dict(one.state_dict())
    assert other.fold().token_ids == (1, 2)
    assert torch.equal(other.fold().embeddings, SMALL[[1, 2]])
    assert set(one.state_dict()) == {"token_ids", "vectors"}


def test_starts() -> None:
    assert make(Settings(length=4), material(bos_id=1))().token_ids == (1, 5, 6, 7)
    assert make(Settings(length=2, init="text:ab"), material())().token_ids == (97, 98)
    assert len(make(Settings(length=4, init="random"), material())().token_ids or ()) == 4
    with pytest.raises(ConfigError, match="--init: expected text or text:WORDS or random or mask; found 'zeros'"):
        make(Settings(init="zeros"), material())
