"""Prefix-Tuning (Li & Liang 2021, arXiv 2101.00190) for decoders: trained keys and values in every layer.

Where the paper and the official code differ, this follows the code: keys and values are free after projection (the
paper speaks of activations), the MLP's bottleneck is 512 wide, and there is no prefix dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods import initialization, start
from prefixkit.methods.method import Material, Method
from prefixkit.methods.reparameterization import MLP, REPARAMETERIZATIONS, Direct
from prefixkit.settings import at_least, check_types, one_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: prefix slots.
        init: `text` (the training data's own words), `text:WORDS`, `random`, `zeros` or `prefix:FILE`.
        reparameterization: `none`, or `mlp` as in the paper.
        bottleneck: width of the MLP's middle layer.
        positions: `offset` counts the text from `length`, as decoders' caches do; `none` counts it from 0.
    """

    name: str = "prefix-tuning"
    length: int = 16
    init: str = "text"
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
        """Chosen by tests/bench/defaults.py."""
        return {"none": 1e-1, "mlp": 2e-3}[self.reparameterization]


class PrefixTuning(Method):
    """A trainable key-value prefix. Calling the module gives the current `KeyValuePrefix`, with gradients.

    Args:
        start: where training begins; its `frozen_slots` leading slots stay what they are.
        reparameterization: `none` trains the prefix itself, `mlp` a two-layer network that produces it.
        hidden: width of the MLP's embedding; the official code takes the backbone's hidden size.
        bottleneck: width of the MLP's middle layer.
        paper_start: with `mlp`, begin at the MLP's own random output as the official code does, not at `start`.

    Raises:
        ConfigError: an unknown reparametrisation, or no slot that is not frozen.
    """

    frozen: Tensor | None

    def __init__(
        self,
        start: KeyValuePrefix,
        *,
        reparameterization: str = "none",
        hidden: int = 512,
        bottleneck: int = 512,
        paper_start: bool = False,
    ) -> None:
        super().__init__()
        # Not a tensor attribute of the module: only its shapes are kept, never a second copy of the start.
        self._layout = replace(
            start, keys=tuple(map(_shape_only, start.keys)), values=tuple(map(_shape_only, start.values))
        )
        _refuse_all_frozen(start)
        # Frozen slots are no parameters, so that neither weight decay nor an MLP's shared layers can move them.
        whole = _flatten(start)
        self.register_buffer("frozen", whole[: start.frozen_slots].clone() if start.frozen_slots else None)
        flat = whole[start.frozen_slots :]
        if reparameterization == "none":
            self.prefix: nn.Module = Direct(flat)
        elif reparameterization == "mlp":
            begin = torch.zeros_like(flat) if paper_start else flat
            self.prefix = MLP(begin, hidden=hidden, bottleneck=bottleneck, exact_start=not paper_start)
        else:
            known = " or ".join(REPARAMETERIZATIONS)
            raise ConfigError("reparameterization", expected=known, found=reparameterization)

    def forward(self) -> KeyValuePrefix:
        """The prefix that the current parameters make."""
        return _unflatten(self._flat(), self._layout)

    @torch.no_grad()
    def fold(self) -> KeyValuePrefix:
        """The prefix as constants: any reparametrisation is computed once and left behind."""
        return _unflatten(self._flat().detach().clone(), self._layout)

    def _flat(self) -> Tensor:
        trained: Tensor = self.prefix()
        return trained if self.frozen is None else torch.cat([self.frozen, trained])


def make(settings: Settings, material: Material) -> PrefixTuning:
    """Prefix-Tuning at its start. Raises ConfigError for a start that it does not know."""
    offset = settings.positions == "offset"
    begin = _start(settings, material)
    return PrefixTuning(
        replace(begin, positions=Positions(text_start=begin.length if offset else 0, prefix_takes_positions=offset)),
        reparameterization=settings.reparameterization,
        hidden=material.backbone.hidden_size,
        bottleneck=settings.bottleneck,
        paper_start=settings.init == "random",
    )


def _start(settings: Settings, material: Material) -> KeyValuePrefix:
    match settings.init.partition(":"):
        case "text", _, words:
            text = start.words(material, words)
            # A trained BOS would no longer be the one that the contract promises.
            frozen = 0 if material.bos_id is None else 1
            return replace(initialization.from_text(material.backbone, text, settings.length), frozen_slots=frozen)
        case "random", "", _:
            return initialization.random_like(material.backbone, material.words, settings.length, material.seed)
        case "zeros", "", _:
            return initialization.zeros(material.backbone, settings.length)
        case "prefix", _, file if file:
            return start.from_parent(material, file, settings.length, KeyValuePrefix)
    raise start.unknown(settings.name, settings.init)


def _refuse_all_frozen(start: KeyValuePrefix) -> None:
    if start.length and start.frozen_slots >= start.length:
        raise ConfigError(
            "--length",
            expected="a slot to train behind the frozen ones",
            found=f"{start.frozen_slots} of {start.length} frozen",
            next_step=f"use --length {start.frozen_slots + 1} or more",
        )


def _shape_only(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _flatten(prefix: KeyValuePrefix) -> Tensor:
    """[prefix, width]: per slot layer 0's key, its value, layer 1's key, …"""
    parts = [part for pair in zip(prefix.keys, prefix.values, strict=True) for part in pair]
    return torch.cat([part.float().transpose(0, 1).flatten(1) for part in parts], dim=1)


def _unflatten(flat: Tensor, layout: KeyValuePrefix) -> KeyValuePrefix:
    shapes = [part.shape for pair in zip(layout.keys, layout.values, strict=True) for part in pair]
    ends = [0]
    for heads, _, dim in shapes:
        ends.append(ends[-1] + heads * dim)
    parts = [
        flat[:, begin:end].reshape(-1, shape[0], shape[2]).transpose(0, 1)
        for (begin, end), shape in zip(pairwise(ends), shapes, strict=True)
    ]
    return replace(layout, keys=tuple(parts[0::2]), values=tuple(parts[1::2]))
