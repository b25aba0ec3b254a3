"""P-Tuning v2 (Liu et al. 2022, arXiv 2110.07602): a prefix in every layer of an encoder or decoder, and a head.

As in the official code keys and values are free, or made by an MLP, and a linear head reads the first token, or each
one for tags. Left out: its dropout on keys and values, and the frozen random pooler that its RoBERTa reads through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods import initialization, start
from prefixkit.methods.method import Material
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.methods.reparameterization import REPARAMETERIZATIONS
from prefixkit.settings import at_least, check_types, one_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: prefix slots; the paper finds that tagging wants more of them than classification.
        init: `random`, at the scale of the backbone's own keys and values; `normal`, the code's standard normal;
            `text`, `text:WORDS`; or `prefix:FILE`, whose head is taken over where it has the same labels.
        reparameterization: `none`, or `mlp`.
        bottleneck: width of the MLP's middle layer.
        positions: `offset` counts the text from `length`, as the code does on BERT and RoBERTa; `none` from 0.
    """

    name: str = "p-tuning-v2"
    length: int = 16
    init: str = "random"
    reparameterization: str = "none"
    bottleneck: int = 512
    positions: str = "offset"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        at_least("bottleneck", self.bottleneck, 1)
        one_of("reparameterization", self.reparameterization, REPARAMETERIZATIONS)
        one_of("positions", self.positions, ("offset", "none"))

    @property
    def default_lr(self) -> float:
        """As those of prefix-tuning are."""
        return {"none": 2e-2, "mlp": 2e-3}[self.reparameterization]

    def on(self, kind: str) -> Settings:
        """The same on either kind."""
        return self


def make(settings: Settings, material: Material) -> PrefixTuning:
    """P-Tuning v2 at its start, without the head. Raises ConfigError for a start that it does not know."""
    offset = settings.positions != "none"
    begin = replace(
        _start(settings, material),
        positions=Positions(text_start=settings.length if offset else 0, prefix_takes_positions=offset),
    )
    return PrefixTuning(
        begin,
        reparameterization=settings.reparameterization,
        hidden=material.backbone.hidden_size,
        bottleneck=settings.bottleneck,
        paper_start=settings.init in ("random", "normal"),
    )


def _start(settings: Settings, material: Material) -> KeyValuePrefix:
    length = settings.length
    match settings.init.partition(":"):
        case "random", "", _:
            return only(initialization.random_like(material.backbone, material.words, length, material.seed))
        case "normal", "", _:
            return normal(only(initialization.zeros(material.backbone, length)), material.seed)
        case "text", _, words:
            return only(initialization.from_text(material.backbone, start.words(material, words), length))
        case "prefix", _, file if file:
            return start.from_parent(material, file, length, KeyValuePrefix)
    raise start.unknown(settings.name, settings.init)


def normal(like: KeyValuePrefix, seed: int) -> KeyValuePrefix:
    """Standard normal numbers in the shape of `like`."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        tuple(torch.randn(each.shape, generator=generator) for each in tensors) for tensors in (like.keys, like.values)
    )
    return replace(like, keys=keys, values=values)


def only(begin: initialization.KeysAndValues) -> KeyValuePrefix:
    """The prefix of a backbone that has one place for it."""
    assert isinstance(begin, KeyValuePrefix)
    return begin
