"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): the backbone's bias terms, as deltas on the frozen ones.

With null prompts (Logan et al. 2022, arXiv 2106.13353), templates of nothing but fields and a mask, it is the paper's
"prompt-free" few-shot learning. Their code also trains the LayerNorms alone, or all LayerNorms and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefixkit.errors import ConfigError
from prefixkit.injections import ParameterDelta
from prefixkit.methods import start
from prefixkit.methods.method import Material, Method
from prefixkit.settings import check_types, one_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        parameters: `bias`, every bias of the backbone, or `layernorm`, the scales and biases of its normalisations;
            those of a language model's head only where it answers.
        init: `zeros`, the backbone as it is, or `prefix:FILE`.
    """

    name: str = "bitfit"
    length: int = 0
    init: str = "zeros"
    parameters: str = "bias"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        one_of("parameters", self.parameters, ("bias", "layernorm"))
        if self.length:
            raise ConfigError("--length", expected="0, as deltas take no place", found=str(self.length))

    @property
    def default_lr(self) -> float:
        """The middle of the range that the paper's code searches for few-shot learning."""
        return 1e-3

    def on(self, kind: str) -> Settings:
        """The same on any backbone."""
        return self


class BitFit(Method):
    """Trainable deltas. Calling the module gives the current `ParameterDelta`, with gradients.

    Args:
        deltas: where training begins, by the parameter's name.
    """

    def __init__(self, deltas: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(sorted(deltas))
        # Names with dots are no names of parameters.
        self.deltas = nn.ParameterList([deltas[name].clone() for name in self.names])

    def forward(self) -> ParameterDelta:
        """What the current parameters make."""
        return ParameterDelta(deltas=dict(zip(self.names, self.deltas, strict=True)))

    @torch.no_grad()
    def fold(self) -> ParameterDelta:
        """The same as constants."""
        return ParameterDelta(deltas={name: delta.detach().clone() for name, delta in self().deltas.items()})


def make(settings: Settings, material: Material) -> BitFit:
    """BitFit at its start. Raises ConfigError for a start that it does not know, or a backbone without biases."""
    # Behind a trained head, that of the language model would be parameters that nothing reads.
    known = material.backbone.parameter_shapes(settings.parameters, reading=not material.writes)
    if not known:
        found, step = f"a backbone without a {settings.parameters}", "use --set method.parameters=layernorm"
        raise ConfigError("--method bitfit", expected="parameters to train", found=found, next_step=step)
    match settings.init.partition(":"):
        case "zeros", "", _:
            return BitFit({name: torch.zeros(shape) for name, shape in known.items()})
        case "prefix", _, file if file:
            return BitFit(start.from_parent(material, file, 0, ParameterDelta).deltas)
    raise start.unknown(settings.name, settings.init)
