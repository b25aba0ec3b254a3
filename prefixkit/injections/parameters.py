"""What changes or extends the backbone's own parameters: deltas on them, and a head behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from prefixkit.format import names
from prefixkit.format.manifest import InjectionRecord
from prefixkit.injections.arrays import array
from prefixkit.prefix import Array


@dataclass(frozen=True, kw_only=True)
class ParameterDelta:
    """What is added to some of the backbone's parameters.

    Ben Zaken et al. 2022 (arXiv 2106.10199) train biases so (BitFit).

    Attributes:
        deltas: by the parameter's name in the model, without the prefix of the base model.
    """

    deltas: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        """None of the text's places is taken."""
        return 0

    def record(self) -> InjectionRecord:
        """How a manifest describes this injection."""
        return InjectionRecord(kind="parameter_delta", names=tuple(sorted(self.deltas)))

    def arrays(self) -> dict[str, Array]:
        """The tensors under the names that a prefix file gives them."""
        return {names.delta(name): array(delta) for name, delta in self.deltas.items()}


@dataclass(frozen=True, kw_only=True)
class TaskHead:
    """A linear map of the backbone's final states.

    Attributes:
        weight: [labels, hidden].
        bias: [labels].
        reads: `first`, `last`, `mean` or `each`: which states.
    """

    weight: Tensor
    bias: Tensor
    reads: str

    @property
    def length(self) -> int:
        """None of the text's places is taken."""
        return 0

    def record(self) -> InjectionRecord:
        """How a manifest describes this injection."""
        return InjectionRecord(kind="task_head", labels=self.weight.shape[0], reads=self.reads)

    def arrays(self) -> dict[str, Array]:
        """The tensors under the names that a prefix file gives them."""
        return {names.HEAD_WEIGHT: array(self.weight), names.HEAD_BIAS: array(self.bias)}
