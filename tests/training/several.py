"""A run as several processes have it: `torchrun -m tests.training.several CASES RESULTS` runs each of some cases."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from prefixkit import prefix
from prefixkit.backbones import load
from prefixkit.backbones.hidden import layers_of
from prefixkit.training import loading, loop, replicas
from prefixkit.training.config import from_mapping
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.processes import Group, is_first, processes
from prefixkit.training.progress import Silence, Step, Validation


class Hearing(Silence):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations: list[float] = []
        self.messages: list[str] = []

    def on_step(self, step: Step) -> None:
        self.losses.append(step.loss)

    def on_validation(self, validation: Validation) -> None:
        self.validations.append(validation.loss)

    def on_message(self, message: str) -> None:
        self.messages.append(message)


class Dropped(DistributedDataParallel):
    """One that exchanges no gradients."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with self.no_sync():
            return super().forward(*inputs, **named)


def outcome(
    settings: Mapping[str, Any], *, double: bool = False, dropped: bool = False, stopped: int = 0
) -> dict[str, Any]:
    """What a run tells and makes.

    Args:
        double: in float64.
        dropped: without the exchange of gradients.
        stopped: the step at which the last process gets a SIGTERM; the run is resumed then.
    """
    heard = Hearing()
    with (
        patch.object(replicas, "DistributedDataParallel", Dropped if dropped else DistributedDataParallel),
        patch.object(loading, "load_backbone", _doubled if double else load.load_backbone),
        patch.object(loop, "save", _saved_singly),
    ):
        try:
            kept = _run(settings, heard, double=double, stopped=stopped)
        except (KeyboardInterrupt, SystemExit):
            kept = _run(settings, heard, double=double, resume=True)
    values = {name: tensor.detach().tolist() for name, tensor in kept.method.state_dict().items()}
    weights = sum(weight.numel() for weight in local(kept))
    told = {"losses": heard.losses, "validations": heard.validations, "messages": heard.messages}
    steps = prefix.load(settings["output"]).manifest.provenance.metrics["steps"] if is_first() else None
    return {**told, "values": values, "weights": weights, "best": steps}


def local(prepared: Prepared) -> list[torch.Tensor]:
    """What this process holds of the layers' weights."""
    weights = layers_of(prepared.backbone.model).parameters()
    return [getattr(weight, "_local_tensor", weight) for weight in weights]


def _run(
    settings: Mapping[str, Any], heard: Hearing, *, double: bool, stopped: int = 0, resume: bool = False
) -> Prepared:
    with processes("cpu") as group:
        prepared = prepare(from_mapping(settings), group=group)
        if double:
            prepared.method.double()
        if stopped and group.rank == group.size - 1:
            _signal_at(prepared, stopped, group)
        loop.complete(prepared, resume=resume, listener=heard if group.first else Silence())
    return prepared


def _doubled(*given: Any, **named: Any) -> Any:
    backbone = load.load_backbone(*given, **named)
    backbone.model.double()
    return backbone


def _saved_singly(made: prefix.Prefix, path: str) -> prefix.Prefix:
    tensors = {name: array.astype(np.float32) for name, array in made.tensors.items()}
    return prefix.save(replace(made, tensors=tensors), path)


def _signal_at(prepared: Prepared, step: int, group: Group) -> None:
    real = prepared.batches.batch

    def batch(number: int) -> Any:
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return real(number)

    prepared.batches.batch = batch  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, results = (Path(argument) for argument in sys.argv[1:])
    found = {name: outcome(**case) for name, case in json.loads(cases.read_text()).items()}
    if is_first():
        results.write_text(json.dumps(found))
