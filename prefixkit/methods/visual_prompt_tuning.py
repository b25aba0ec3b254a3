"""Visual Prompt Tuning (Jia et al. 2022, arXiv 2203.12119): trained vectors among the tokens of an image.

Deep prompts begin anew in every layer: their rows are constants there, so that they fold into keys and values. Shallow
ones pass through all layers with the image. The ablation `add` changes the image's tokens instead of adding to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from prefixkit.injections import EmbeddingPrompt, HiddenPrompt
from prefixkit.injections.combined import NOWHERE
from prefixkit.methods import start
from prefixkit.methods.method import Material, Method
from prefixkit.settings import at_least, check_types, one_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: prompt vectors, in each layer where they are deep; with `add` the patches that are changed.
        init: `uniform`, as the code draws them: Xavier's bound for the patch embedding.
        depth: `deep` or `shallow`.
        location: `prepend`, behind the class token, or `add`, onto the first patches.
    """

    name: str = "visual-prompt-tuning"
    length: int = 10
    init: str = "uniform"
    depth: str = "deep"
    location: str = "prepend"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        one_of("depth", self.depth, ("deep", "shallow"))
        one_of("location", self.location, ("prepend", "add"))

    @property
    def default_lr(self) -> float:
        """For AdamW; the code's SGD takes another."""
        return 1e-2

    def on(self, kind: str) -> Settings:
        """The same: there is one kind of backbone for it."""
        return self


class VisualPromptTuning(Method):
    """Trainable prompts of an image encoder. Calling the module gives them, with gradients.

    Args:
        rows: [layers, prefix, hidden], where training begins: one layer where prompts are shallow.
        layers: of the backbone.
    """

    def __init__(self, rows: Tensor, *, layers: int, location: str = "prepend") -> None:
        super().__init__()
        self.rows, self.layers, self.location = nn.Parameter(rows.clone()), layers, location

    def forward(self) -> EmbeddingPrompt | HiddenPrompt:
        """What the current parameters make."""
        return self._made(self.rows)

    @torch.no_grad()
    def fold(self) -> EmbeddingPrompt | HiddenPrompt:
        """The same as constants."""
        return self._made(self.rows.detach().clone())

    def _made(self, rows: Tensor) -> EmbeddingPrompt | HiddenPrompt:
        shallow = len(rows) < self.layers
        if shallow and self.location == "prepend":
            return EmbeddingPrompt(embeddings=rows[0], positions=NOWHERE, stack="encoder", placement="after_first")
        missing = rows.new_zeros(self.layers - len(rows), *rows.shape[1:])
        mode = "replace" if self.location == "prepend" else "add"
        hidden = tuple(torch.cat([rows, missing]))
        return HiddenPrompt(hidden=hidden, mode=mode, placement="after_first", positions=NOWHERE)


def make(settings: Settings, material: Material) -> VisualPromptTuning:
    """Visual Prompt Tuning at its start. Raises ConfigError for a start that it does not know."""
    if settings.init != "uniform":
        raise start.unknown(settings.name, settings.init)
    backbone = material.backbone
    # Xavier's bound for a layer from a patch to the hidden size, as the code has it.
    bound = sqrt(6 / (backbone.patch_numbers + backbone.hidden_size))
    depth = backbone.layers if settings.depth == "deep" else 1
    generator = torch.Generator().manual_seed(material.seed)
    rows = torch.empty(depth, settings.length, backbone.hidden_size).uniform_(-bound, bound, generator=generator)
    return VisualPromptTuning(rows, layers=backbone.layers, location=settings.location)
