"""P-Tuning (Liu et al. 2021, arXiv 2103.10385): a soft prompt made by a small network, folded away at the end.

The networks are those of the official code: the LSTM of its LAMA part, the MLP of its few-shot part. The prompt stands
in the slots that the task's template marks with `{slot}`, or else before the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixkit.methods import start
from prefixkit.methods.initialization import repeated
from prefixkit.methods.method import Material
from prefixkit.methods.placement import place_for
from prefixkit.methods.prompt_tuning import PromptTuning
from prefixkit.settings import at_least, check_types, one_of

ENCODERS = ("lstm", "mlp")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: prompt vectors.
        init: `random` (the network's own output, as in the paper), or `text` and `text:WORDS`: the network's output is
            added to the vectors of words and starts at zero.
        encoder: `lstm` or `mlp`.
    """

    name: str = "p-tuning"
    length: int = 16
    init: str = "random"
    encoder: str = "lstm"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        one_of("encoder", self.encoder, ENCODERS)

    @property
    def default_lr(self) -> float:
        """Chosen by tests/bench/defaults.py."""
        return 3e-3

    def on(self, kind: str) -> Settings:
        """The same on either kind."""
        return self


class PromptEncoder(nn.Module):
    """Embedding(prefix, hidden) -> two-layer bidirectional LSTM or nothing -> Linear -> ReLU -> Linear.

    Args:
        start: [prefix, hidden], a constant that the output is added to.
        exact_start: begin at `start`, with an output of zero; otherwise at the random output of the official code.
    """

    start: Tensor

    def __init__(self, start: Tensor, *, encoder: str, exact_start: bool) -> None:
        super().__init__()
        length, hidden = start.shape
        self.register_buffer("start", start.clone())
        self.embedding = nn.Embedding(length, hidden)
        halves = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.lstm = nn.LSTM(hidden, hidden // 2, **halves) if encoder == "lstm" else None
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        if exact_start:
            nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        """[prefix, hidden]."""
        rows = self.embedding.weight
        if self.lstm is not None:
            rows = self.lstm(rows[None])[0][0]
        made: Tensor = self.head(rows)
        return self.start + made


def make(settings: Settings, material: Material) -> PromptTuning:
    """P-Tuning at its start. Raises ConfigError for a start that it does not know."""
    begin, frozen = _start(settings, material), 0 if material.bos_id is None else 1
    network = PromptEncoder(begin[frozen:], encoder=settings.encoder, exact_start=settings.init != "random")
    return PromptTuning(begin, frozen_slots=frozen, network=network, place=place_for(material))


def _start(settings: Settings, material: Material) -> Tensor:
    match settings.init.partition(":"):
        case "random", "", _:
            return torch.zeros(settings.length, material.backbone.hidden_size)
        case "text", _, words:
            tokens = repeated(start.words(material, words), settings.length)
            return material.backbone.vocabulary[tokens].float().cpu()
    raise start.unknown(settings.name, settings.init)
