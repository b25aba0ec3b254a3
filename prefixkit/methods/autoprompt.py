"""AutoPrompt (Shin et al. 2020, arXiv 2010.15980): a prompt of real tokens, found by following the gradient.

The search itself is in `prefixkit.training.hotflip`, that for label words in `prefixkit.training.label_search`. The
file carries the tokens and the vectors that they have. They stand in the slots that the task's template marks with
`{slot}`, as the paper's do, or else before the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixkit.injections import EmbeddingPrompt
from prefixkit.methods import start
from prefixkit.methods.initialization import repeated
from prefixkit.methods.method import Material, Method
from prefixkit.methods.placement import Place, place_for
from prefixkit.methods.prompt_tuning import BEFORE
from prefixkit.settings import at_least, check_types


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is searched.

    Attributes:
        length: prompt tokens.
        init: `text` (the training data's own words), `text:WORDS`, `random`, or `mask`, as in the paper.
        candidates: how many tokens are tried for a slot in a step.
    """

    name: str = "autoprompt"
    length: int = 8
    init: str = "text"
    candidates: int = 10

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        at_least("candidates", self.candidates, 1)

    @property
    def default_lr(self) -> float:
        """A search has no learning rate; any number does."""
        return 1.0

    def on(self, kind: str) -> Settings:
        """The same on either kind."""
        return self


class AutoPrompt(Method):
    """A prompt of tokens. Calling the module gives it as an `EmbeddingPrompt`, whose vectors have a gradient.

    Args:
        token_ids: the prompt at first.
        vocabulary: [vocab, hidden], the vectors to choose from.
        candidates: how many tokens a step tries.
        fixed: how many leading tokens stay.
        excluded: tokens that are never chosen, such as special ones.
        place: where they stand.
    """

    token_ids: Tensor
    vocabulary: Tensor
    excluded: Tensor

    def __init__(
        self,
        token_ids: Sequence[int],
        vocabulary: Tensor,
        *,
        candidates: int = 10,
        fixed: int = 0,
        excluded: Sequence[int] = (),
        place: Place = BEFORE,
    ) -> None:
        super().__init__()
        self.place = place
        self.candidates, self.fixed = candidates, fixed
        self.register_buffer("token_ids", torch.tensor(token_ids))
        self.register_buffer("vocabulary", vocabulary.float(), persistent=False)
        self.register_buffer("excluded", torch.tensor(list(excluded), dtype=torch.long), persistent=False)
        self.vectors = nn.Parameter(vocabulary[list(token_ids)].float().clone())

    def forward(self) -> EmbeddingPrompt:
        """The prompt as it stands."""
        return self.place.prompt(self.vectors, tuple(self.token_ids.tolist()))

    @torch.no_grad()
    def fold(self) -> EmbeddingPrompt:
        """The prompt as constants."""
        return self.place.prompt(self.vectors.detach().clone(), tuple(self.token_ids.tolist()))

    @torch.no_grad()
    def likely_better(self, slot: int) -> list[int]:
        """The tokens that by the gradient lower the loss most at `slot`, best first (Ebrahimi et al. 2018, HotFlip)."""
        assert self.vectors.grad is not None
        falls = -(self.vocabulary @ self.vectors.grad[slot])
        falls[self.excluded] = -torch.inf
        return falls.topk(min(self.candidates, len(falls) - len(self.excluded))).indices.tolist()

    @torch.no_grad()
    def put(self, slot: int, token: int) -> None:
        """Place `token` at `slot`."""
        self.token_ids[slot] = token
        self.vectors[slot] = self.vocabulary[token]


def make(settings: Settings, material: Material) -> AutoPrompt:
    """AutoPrompt at its start. Raises ConfigError for a start that it does not know."""
    return AutoPrompt(
        _start(settings, material),
        material.backbone.vocabulary,
        candidates=settings.candidates,
        fixed=0 if material.bos_id is None else 1,
        # The words that stand for labels would give the answer away.
        excluded=sorted({*material.special_ids, *(token for label in material.labels for token in label)}),
        place=place_for(material),
    )


def _start(settings: Settings, material: Material) -> list[int]:
    match settings.init.partition(":"):
        case "text", _, words:
            return repeated(start.words(material, words), settings.length)
        case "mask", "", _ if material.mask_id is not None:
            return [material.mask_id] * settings.length
        case "random", "", _:
            generator = torch.Generator().manual_seed(material.seed)
            allowed = sorted(set(range(material.backbone.vocabulary.shape[0])) - set(material.special_ids))
            drawn = torch.randint(len(allowed), (settings.length,), generator=generator)
            return [allowed[index] for index in drawn.tolist()]
    raise start.unknown(settings.name, settings.init)
