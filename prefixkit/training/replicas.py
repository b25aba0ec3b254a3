"""Data parallel training: the method in every process, its gradients summed by torch's DistributedDataParallel.

Of every step's batch each process computes its share of the examples, against a backbone of its own or a share of one
(`prefixkit.backbones.sharding`). The loss is weighed by the targets of the whole batch, so that a run is the same in
any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefixkit.errors import ConfigError
from prefixkit.methods.autoprompt import AutoPrompt
from prefixkit.training.preparation import Prepared


class Share(nn.Module):
    """From a batch to its loss: what DistributedDataParallel is around. Its parameters are the method's alone."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        self.method, self._prepared = prepared.method, prepared

    def forward(self, batch: Any, counts: int) -> Tensor:
        """The summed loss of `batch`, times `counts`."""
        return self._prepared.objective(self._prepared.backbone, batch, self.method()) * counts


def replicated(prepared: Prepared) -> Callable[[int], Tensor] | None:
    """From a step to the summed loss of this process's share of its batch; None for a process alone.

    Going backward, DistributedDataParallel leaves the mean of all processes' gradients in each.

    Raises:
        ConfigError: a method that does not follow its gradients, but asks the backbone which way to go.
    """
    group = prepared.group
    if group.size == 1:
        return None
    if isinstance(prepared.method, AutoPrompt):
        step = "start it without torchrun"
        raise ConfigError("--method autoprompt", expected="one process", found=f"{group.size}", next_step=step)
    parallel, batches = DistributedDataParallel(Share(prepared)), prepared.batches

    def loss(step: int) -> Tensor:
        own, counts = group.share([batches.examples[index] for index in batches.indices(step)])
        total: Tensor = parallel(batches.collate(own), counts)
        return total

    return loss
