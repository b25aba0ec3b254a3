"""Activations in one kernel that `transformers` writes out in eight: the time and the memory of seven of them.

GELU's tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415), which GPT-2, GPT-J, Phi and T5 1.1 have; equal but for
rounding.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation

WRITTEN_OUT = (NewGELUActivation, FastGELUActivation)
"""Their modules."""


def fuse_activations(model: PreTrainedModel) -> None:
    """Put the fused form in the place of the one written out, in every module of `model`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, WRITTEN_OUT):
                setattr(module, name, nn.GELU(approximate="tanh"))
