"""Soft prompts (Qin & Eisner 2021, arXiv 2104.06599): words of a pattern, and what is added to them in every layer.

The pattern's words stand in the slots of a cloze template and keep their vectors; trained is the perturbation that is
added at their places, to the embeddings' output and to the input of every further layer. The paper's last one, added
to the output of the last layer, changes nothing that a mask reads, and is left out. Several patterns make a mixture:
`prefixkit.training.mixture`. Weights that depend on the input are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixkit.injections import Combined, EmbeddingPrompt, HiddenPrompt
from prefixkit.injections.combined import NOWHERE
from prefixkit.methods import start
from prefixkit.methods.initialization import repeated
from prefixkit.methods.method import Material, Method
from prefixkit.settings import at_least, check_types


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: slots, as many as the template marks.
        init: the pattern's words: `text:WORDS`, or `text`, the training data's own.
        depth: how many layers' inputs are perturbed, the embeddings' output first; None for all.
    """

    name: str = "soft-prompts"
    length: int = 1
    init: str = "text"
    depth: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        at_least("depth", self.depth, 1)

    @property
    def default_lr(self) -> float:
        """That of the paper's code."""
        return 1e-3

    def on(self, kind: str) -> Settings:
        """The same: there is one kind of backbone for it."""
        return self


class SoftPrompt(Method):
    """Words in slots and a trainable perturbation of them. Calling the module gives both, with gradients.

    Args:
        words: [prefix, hidden], the vectors of the pattern's words.
        token_ids: which they are.
        layers: of the backbone.
        depth: how many layers' inputs are perturbed.
    """

    words: Tensor

    def __init__(self, words: Tensor, token_ids: tuple[int, ...], *, layers: int, depth: int) -> None:
        super().__init__()
        self.register_buffer("words", words.clone())
        self.token_ids, self.layers = token_ids, layers
        self.perturbation = nn.Parameter(torch.zeros(depth, *words.shape))

    def forward(self) -> Combined:
        """What the current parameters make."""
        return self._made(self.words, self.perturbation)

    @torch.no_grad()
    def fold(self) -> Combined:
        """The same as constants."""
        return self._made(self.words.clone(), self.perturbation.detach().clone())

    def _made(self, words: Tensor, perturbation: Tensor) -> Combined:
        untouched = perturbation.new_zeros(self.layers - len(perturbation), *words.shape)
        prompt = EmbeddingPrompt(
            embeddings=words, positions=NOWHERE, token_ids=self.token_ids, stack="encoder", placement="slots"
        )
        hidden = tuple(torch.cat([perturbation, untouched]))
        return Combined(parts=(prompt, HiddenPrompt(hidden=hidden, mode="add", placement="slots", positions=NOWHERE)))


def make(settings: Settings, material: Material) -> SoftPrompt:
    """A soft prompt at its start. Raises ConfigError for a start that it does not know."""
    kind, _, words = settings.init.partition(":")
    if kind != "text":
        raise start.unknown(settings.name, settings.init)
    tokens = repeated(start.words(material, words), settings.length)
    backbone = material.backbone
    depth = min(settings.depth or backbone.layers, backbone.layers)
    vectors = backbone.vocabulary[tokens].float().cpu()
    return SoftPrompt(vectors, tuple(tokens), layers=backbone.layers, depth=depth)
