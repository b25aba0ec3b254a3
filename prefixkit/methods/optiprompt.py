"""OptiPrompt (Zhong et al. 2021, arXiv 2104.05240): new tokens in a cloze template, such as `{input} [V] [V] [MASK] .`

The paper's code appends tokens to the vocabulary and trains their rows alone. The rows are the whole of it: here they
are the file, and stand in the slots of a template. Its warm-up of a tenth of the steps is
`--set optimizer.warmup_steps=N`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefixkit.errors import ConfigError
from prefixkit.methods import start
from prefixkit.methods.method import Material
from prefixkit.methods.placement import place_for
from prefixkit.methods.prompt_tuning import PromptTuning
from prefixkit.settings import at_least, check_types


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: slots, as many as the template marks.
        init: `random`, normal numbers of the vocabulary's mean and spread, or `manual:WORDS`, the vectors of the word
            pieces of a template that a person wrote, one a slot.
    """

    name: str = "optiprompt"
    length: int = 5
    init: str = "random"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)

    @property
    def default_lr(self) -> float:
        """That of the paper's code."""
        return 3e-3

    def on(self, kind: str) -> Settings:
        """The same on either kind."""
        return self


def make(settings: Settings, material: Material) -> PromptTuning:
    """OptiPrompt at its start. Raises ConfigError for a start that it does not know, or of another length."""
    return PromptTuning(_start(settings, material), place=place_for(material))


def _start(settings: Settings, material: Material) -> Tensor:
    vocabulary = material.backbone.vocabulary
    match settings.init.partition(":"):
        case "random", "", _:
            generator = torch.Generator().manual_seed(material.seed)
            drawn = torch.randn(settings.length, vocabulary.shape[1], generator=generator)
            return vocabulary.float().mean(dim=0).cpu() + vocabulary.float().std().cpu() * drawn
        case "manual", _, words if words:
            pieces = material.tokenize(words)
            if len(pieces) != settings.length:
                expected, step = f"{settings.length} word pieces, one a slot", "write as many {slot} into the template"
                raise ConfigError("--init manual", expected=expected, found=f"{len(pieces)}", next_step=step)
            return vocabulary[pieces].float().cpu()
    raise start.unknown(settings.name, settings.init)
