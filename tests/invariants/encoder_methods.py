"""Every kind of method on encoders, begun at numbers that mean nothing, and the families that it is tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prefixkit.backbones.deltas import biases
from prefixkit.backbones.encoder import Encoder
from prefixkit.methods.bitfit import BitFit
from prefixkit.methods.method import Method
from prefixkit.methods.placement import Place
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.methods.prompt_tuning import PromptTuning
from prefixkit.methods.visual_prompt_tuning import VisualPromptTuning
from tests.invariants.attention import random_prefix


def prefix(backbone: Encoder, **settings: object) -> Method:
    start = random_prefix(backbone, offset=backbone.kind == "encoder")
    return PrefixTuning(start, **settings)  # type: ignore[arg-type]


def visual(backbone: Encoder, layers: int, location: str = "prepend") -> Method:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(layers, 3, backbone.hidden_size, generator=generator)
    return VisualPromptTuning(drawn, layers=backbone.layers, location=location)


METHODS: dict[str, Callable[[Encoder], Method]] = {
    "p-tuning-v2": prefix,
    "p-tuning-v2 mlp": lambda backbone: prefix(backbone, reparameterization="mlp", bottleneck=8, paper_start=True),
    "deep": lambda backbone: visual(backbone, 2),
    "shallow": lambda backbone: visual(backbone, 1),
    "add": lambda backbone: visual(backbone, 2, "add"),
    "add to the first layer": lambda backbone: visual(backbone, 1, "add"),
    "bitfit": lambda backbone: BitFit({name: torch.zeros_like(bias) for name, bias in biases(backbone.model).items()}),
    "prompt-tuning": lambda backbone: PromptTuning(backbone.vocabulary[[5, 6, 7]], place=Place("encoder")),
}
CELLS = [
    *((method, family) for method in ("p-tuning-v2", "p-tuning-v2 mlp", "bitfit") for family in ("bert", "vit")),
    *(
        (method, family)
        for method in ("deep", "shallow", "add", "add to the first layer")
        for family in ("vit", "deit")
    ),
    *(("prompt-tuning", family) for family in ("bert", "distilbert")),
]
