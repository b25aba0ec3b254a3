"""Prompt Tuning (Lester et al. 2021, arXiv 2104.08691): trained input vectors before the text.

On T5, the paper's model, and on BART the prompt stands at the encoder's input, and the decoder looks at it too. On
decoders it stands at the first positions. `uniform` is the paper's U(-0.5, 0.5); its code draws from U(0, 0.5), which
is `uniform:code`.

How far token vectors spread differs by orders of magnitude between models. By default the learning rate counts in the
spread of the backbone's own, so that one rate serves them all. The paper counts in ones and trains with Adafactor:
`--set method.unit=one --set optimizer.name=adafactor --set optimizer.schedule=constant
--set optimizer.weight_decay=1e-5 --lr 0.3`.

With `reparameterization=mlp` it is the embedding-only ablation of Prefix-Tuning (Li & Liang 2021, section 7.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixkit.injections import EmbeddingPrompt
from prefixkit.methods import prompt_initialization as initialization
from prefixkit.methods import start
from prefixkit.methods.initialization import repeated
from prefixkit.methods.method import Material, Method
from prefixkit.methods.placement import Place, place_for
from prefixkit.methods.reparameterization import MLP, REPARAMETERIZATIONS, Direct, Steps
from prefixkit.settings import at_least, check_types, one_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: prompt vectors.
        init: `text` (the training data's own words), `text:WORDS`, `vocabulary` (common tokens by chance), `uniform`,
            `uniform:code`, `labels` (the answers of the task), `npy:FILE` or `prefix:FILE`.
        reparameterization: `none`, or `mlp`, whose output is added to the start.
        bottleneck: width of the MLP's middle layer.
        unit: of the learning rate: `spread`, the standard deviation of the vocabulary's vectors, or `one`.
    """

    name: str = "prompt-tuning"
    length: int = 16
    init: str = "text"
    reparameterization: str = "none"
    bottleneck: int = 512
    unit: str = "spread"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        at_least("bottleneck", self.bottleneck, 1)
        one_of("reparameterization", self.reparameterization, REPARAMETERIZATIONS)
        one_of("unit", self.unit, ("spread", "one"))

    @property
    def default_lr(self) -> float:
        """Chosen by tests/bench/defaults.py."""
        return {"none": 3e-1, "mlp": 2e-3}[self.reparameterization]

    def on(self, kind: str) -> Settings:
        """The same on each of them."""
        return self


BEFORE = Place()
"""In front of a decoder's text."""


class PromptTuning(Method):
    """A trainable prompt. Calling the module gives the current `EmbeddingPrompt`, with gradients.

    Args:
        start: [prefix, hidden], where training begins.
        frozen_slots: how many leading vectors stay what they are.
        network: what is trained in the place of the others, giving [prefix - frozen_slots, hidden]; by default they
            themselves.
        place: where the vectors stand.
    """

    frozen: Tensor | None

    def __init__(
        self, start: Tensor, *, frozen_slots: int = 0, network: nn.Module | None = None, place: Place = BEFORE
    ) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("frozen", start[:frozen_slots].clone() if frozen_slots else None)
        self.prompt = network if network is not None else Direct(start[frozen_slots:])

    def forward(self) -> EmbeddingPrompt:
        """The prompt that the current parameters make."""
        vectors: Tensor = self.prompt()
        if self.frozen is not None:
            vectors = torch.cat([self.frozen, vectors])
        return self.place.prompt(vectors)

    @torch.no_grad()
    def fold(self) -> EmbeddingPrompt:
        """The prompt as constants."""
        return self.place.prompt(self().embeddings.detach().clone())


def make(settings: Settings, material: Material) -> PromptTuning:
    """Prompt Tuning at its start. Raises ConfigError for a start that it does not know."""
    begin, frozen = _start(settings, material), 0 if material.bos_id is None else 1
    network: nn.Module = Direct(begin[frozen:])
    if settings.reparameterization == "mlp":
        network = MLP(begin[frozen:], hidden=begin.shape[1], bottleneck=settings.bottleneck)
    elif settings.unit == "spread":
        network = Steps(begin[frozen:], unit=material.backbone.vocabulary.std().item())
    return PromptTuning(begin, frozen_slots=frozen, network=network, place=place_for(material))


def _start(settings: Settings, material: Material) -> Tensor:
    backbone, length, seed = material.backbone, settings.length, material.seed
    match settings.init.partition(":"):
        case "text", _, words:
            return backbone.vocabulary[repeated(start.words(material, words), length)].float().cpu()
        case "vocabulary", "", _:
            return initialization.sampled(backbone.vocabulary, length, seed)
        case "labels", "", _:
            return initialization.from_labels(backbone.vocabulary, material.labels, length, seed)
        case "uniform", "", _:
            return initialization.uniform(backbone.hidden_size, length, seed)
        case "uniform", _, "code":
            return initialization.uniform(backbone.hidden_size, length, seed, low=0.0)
        case "npy", _, file if file:
            return initialization.from_npy(file, backbone.hidden_size, length)
        case "prefix", _, file if file:
            return start.from_parent(material, file, length, EmbeddingPrompt).embeddings.float()
    raise start.unknown(settings.name, settings.init)
