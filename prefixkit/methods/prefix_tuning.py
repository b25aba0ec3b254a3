"""Prefix-Tuning (Li & Liang 2021, arXiv 2101.00190): trained keys and values in every layer.

Where the paper and the official code differ, this follows the code: keys and values are free after projection (the
paper speaks of activations), the MLP's bottleneck is 512 wide, and there is no prefix dropout. An encoder-decoder gets
three independent prefixes (the paper speaks of two): in its encoder, in its decoder, and before the encoder's output
where the decoder looks at that.

On a decoder whose task marks slots it is the infix of the paper's section 7.3: a key and a value for each slot, which
attention sees in the place of the slot's own. They are free constants there too, as the paper has the activations of an
infix; the official code adds them to what the frozen model computes of the slots. Keys are as attention consumes them:
with RoPE their distance to the tokens around them changes with the length of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes
from prefixkit.methods import initialization, start
from prefixkit.methods.method import Material, Method
from prefixkit.methods.reparameterization import MLP, REPARAMETERIZATIONS, Direct
from prefixkit.settings import at_least, check_types, one_of

PLACES = tuple(".".join(place) for place in ATTENTIONS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        length: prefix slots, as many as the template marks where it marks some.
        init: `text` (the training data's own words), `text:WORDS`, `random`, `zeros` or `prefix:FILE`.
        reparameterization: `none`, or `mlp` as in the paper.
        bottleneck: width of the MLP's middle layer.
        positions: `offset` counts the text from `length`, as decoders' caches do; `none` counts it from 0, as
            encoder-decoders always do. Slots of the text have its positions.
        stacks: where an encoder-decoder gets a prefix: `decoder.self`, `encoder.self`, `decoder.cross`, or several with
            commas between them; all three by default.
    """

    name: str = "prefix-tuning"
    length: int = 16
    init: str = "text"
    reparameterization: str = "none"
    bottleneck: int = 512
    positions: str | None = None
    stacks: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        at_least("bottleneck", self.bottleneck, 1)
        one_of("reparameterization", self.reparameterization, REPARAMETERIZATIONS)
        one_of("positions", self.positions or "none", ("offset", "none"))
        for place in (self.stacks or PLACES[0]).split(","):
            one_of("stacks", place, PLACES)

    @property
    def default_lr(self) -> float:
        """Chosen by tests/bench/defaults.py, on decoders; not measured on encoder-decoders."""
        return {"none": 1e-1, "mlp": 2e-3}[self.reparameterization]

    def on(self, kind: str) -> Settings:
        """The same on a backbone of this kind. Raises ConfigError for what there is on another kind only."""
        if kind == "encoder-decoder":
            if self.positions == "offset":
                raise ConfigError("positions", expected=f"none, as on every {kind}", found="offset")
            return replace(self, positions="none", stacks=self.stacks or ",".join(PLACES))
        if self.stacks is not None:
            raise ConfigError("stacks", expected="an encoder-decoder to choose them on", found=f"a {kind}")
        return replace(self, positions=self.positions or "offset")


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


class PrefixesTuning(Method):
    """A trainable prefix for each of several attentions. They share nothing, neither slots nor MLPs."""

    def __init__(self, methods: Sequence[PrefixTuning]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(methods)

    def forward(self) -> KeyValuePrefixes:
        """The prefixes that the current parameters make."""
        return KeyValuePrefixes(parts=tuple(part() for part in self.parts))

    @torch.no_grad()
    def fold(self) -> KeyValuePrefixes:
        """The prefixes as constants."""
        return KeyValuePrefixes(parts=tuple(cast(PrefixTuning, part).fold() for part in self.parts))


def make(settings: Settings, material: Material) -> PrefixTuning | PrefixesTuning:
    """Prefix-Tuning at its start.

    Raises:
        ConfigError: a start that it does not know, or slots elsewhere than on a decoder or without positions.
    """
    if material.slots:
        _refuse_slots(settings, material)
    begin = _start(settings, material)
    if isinstance(begin, KeyValuePrefix):
        return _trained(begin, settings, material)
    return PrefixesTuning([_trained(part, settings, material) for part in _chosen(begin, settings)])


def _refuse_slots(settings: Settings, material: Material) -> None:
    kind = material.backbone.kind
    if kind != "decoder":
        found, step = f"{material.slots}, on an {kind}", "use --method prompt-tuning"
        raise ConfigError("--method prefix-tuning", expected="a task without slots", found=found, next_step=step)
    if settings.positions == "none":
        step = "leave it out: slots are places of the text"
        raise ConfigError("positions", expected="offset for a task with slots", found="none", next_step=step)


def _chosen(start: KeyValuePrefixes, settings: Settings) -> list[KeyValuePrefix]:
    parts = {part.place: part for part in start.parts}
    wanted = [place for place in PLACES if settings.stacks is None or place in settings.stacks.split(",")]
    for place in wanted:
        if place not in parts:
            found = f"{' and '.join(parts)} alone"
            raise ConfigError("--init", expected=f"a file with a prefix for {place}", found=found)
    return [parts[place] for place in wanted]


def _trained(begin: KeyValuePrefix, settings: Settings, material: Material) -> PrefixTuning:
    offset = settings.positions != "none" and not material.slots
    positions = Positions(text_start=begin.length if offset else 0, prefix_takes_positions=offset)
    return PrefixTuning(
        replace(begin, positions=positions, placement="slots" if material.slots else "prepend"),
        reparameterization=settings.reparameterization,
        hidden=material.backbone.hidden_size,
        bottleneck=settings.bottleneck,
        paper_start=settings.init == "random",
    )


def _start(settings: Settings, material: Material) -> initialization.KeysAndValues:
    match settings.init.partition(":"):
        case "text", _, words:
            text = start.words(material, words)
            # A trained BOS would no longer be the one that the contract promises.
            frozen = 0 if material.bos_id is None else 1
            begin = initialization.from_text(material.backbone, text, settings.length)
            return initialization.each(begin, lambda part: replace(part, frozen_slots=frozen))
        case "random", "", _:
            return initialization.random_like(material.backbone, material.words, settings.length, material.seed)
        case "zeros", "", _:
            return initialization.zeros(material.backbone, settings.length)
        case "prefix", _, file if file:
            if settings.stacks is None:
                return start.from_parent(material, file, settings.length, KeyValuePrefix)
            return start.from_parent(material, file, settings.length, KeyValuePrefixes)
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
