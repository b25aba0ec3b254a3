"""Fused activations: what the written-out form computes, with less kept for the way back."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixkit.backbones.fused import fuse_activations
from tests.architectures import tiny
from tests.ragged import padded, prompts


def kept(model: PreTrainedModel, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits, the gradient of their sum of squares, and the bytes that wait for the way back."""
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(inputs_embeds=vectors, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), vectors)
    return logits.detach(), gradient, sum(sizes.values())


def test_the_same_is_computed_with_less_kept() -> None:
    model = tiny("gpt2").double().requires_grad_(False)
    vectors = model.get_input_embeddings()(padded(prompts())["input_ids"]).requires_grad_()
    logits, gradient, memory = kept(model, vectors)
    fuse_activations(model)
    assert any(isinstance(module, nn.GELU) for module in model.modules())
    fused = kept(model, vectors)
    assert (fused[0] - logits).abs().max() <= 1e-12
    assert (fused[1] - gradient).abs().max() <= 1e-10
    assert fused[2] < 0.7 * memory
