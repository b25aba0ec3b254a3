"""Adafactor: against transformers' own where the two agree, and by hand where they do not."""

from __future__ import annotations

import torch
from transformers.optimization import Adafactor as Reference

from prefixkit.training.adafactor import Adafactor


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(24, generator=generator) * scale for scale in (1.0, 0.01, 5.0, 1.0, 20.0)]


def after(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    for gradient in gradients():
        parameter.grad = gradient.reshape(parameter.shape).clone()
        optimizer.step()
    return parameter.detach().flatten()


def test_equals_the_unfactored_form_of_transformers() -> None:
    """A vector is what `transformers` does not factor; a matrix of ours must move in the same way."""
    vector, matrix = (torch.linspace(-1, 1, 24).requires_grad_() for _ in range(2))
    settings = {"scale_parameter": False, "relative_step": False, "clip_threshold": 1.0, "decay_rate": -0.8}
    theirs = after(Reference([vector], lr=0.3, eps=(1e-30, 1e-3), **settings), vector)
    square = matrix.detach().reshape(4, 6).requires_grad_()
    ours = after(Adafactor([square], lr=0.3), square)
    assert (ours - theirs).abs().max() <= 1e-6
    assert (ours - torch.linspace(-1, 1, 24)).abs().max() > 0.1


def test_weight_decay_is_not_scaled_by_the_learning_rate() -> None:
    parameter = torch.full((3,), 2.0, requires_grad=True)
    parameter.grad = torch.zeros(3)
    Adafactor([parameter], lr=1e-9, weight_decay=0.25).step()
    assert torch.allclose(parameter, torch.full((3,), 1.5))
