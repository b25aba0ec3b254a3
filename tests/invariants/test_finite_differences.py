"""Gradients of every kind of method on encoders against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from prefixkit.backbones.encoder import Encoder
from tests.encoders import rows
from tests.invariants.encoder_methods import CELLS, METHODS

Load = Callable[..., Encoder]
STEP = 1e-5


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_gradients_are_finite_differences(encoder: Load, method: str, family: str) -> None:
    torch.manual_seed(0)
    backbone, (row, *_) = encoder(family, torch.float64), rows(family, torch.float64)
    trained = METHODS[method](backbone).double()
    direction = torch.randn(backbone.hidden_size, generator=torch.Generator().manual_seed(7)).double()

    def loss() -> Tensor:
        return torch.log_softmax(backbone.states(row, trained())[0, 0] * direction, dim=0)[5]

    loss().backward()
    checked = 0
    for parameter, index in places(trained):
        assert parameter.grad is not None
        assert parameter.grad[index].item() == pytest.approx(slope(parameter, index, loss), rel=1e-5, abs=1e-8)
        checked += int(parameter.grad[index].abs() > 1e-6)
    assert checked


def places(module: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[int, ...]]]:
    """Of up to six parameters the number with the largest gradient, and the one in the middle."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    for parameter in parameters[:: max(1, len(parameters) // 6)]:
        assert parameter.grad is not None
        for flat in (int(parameter.grad.abs().argmax()), parameter.numel() // 2):
            yield parameter, tuple(int(each) for each in torch.unravel_index(torch.tensor(flat), parameter.shape))


@torch.no_grad()
def slope(parameter: nn.Parameter, index: tuple[int, ...], loss: Callable[[], Tensor]) -> float:
    parameter[index] += STEP
    above = loss()
    parameter[index] -= 2 * STEP
    below = loss()
    parameter[index] += STEP
    return ((above - below) / (2 * STEP)).item()
