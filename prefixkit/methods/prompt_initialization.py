"""Where a soft prompt starts before training (Lester et al. 2021, section 3.2): [prefix, hidden] in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefixkit.errors import ConfigError

COMMON = 5000
"""Vocabularies are sorted by frequency: the paper samples from this many tokens at their beginning."""


def sampled(vocabulary: Tensor, length: int, seed: int) -> Tensor:
    """Vectors of random common tokens, without replacement where there are enough of them."""
    generator = torch.Generator().manual_seed(seed)
    population = min(COMMON, vocabulary.shape[0])
    if length > population:
        chosen = torch.randint(population, (length,), generator=generator)
    else:
        chosen = torch.randperm(population, generator=generator)[:length]
    return vocabulary[chosen.to(vocabulary.device)].float().cpu()


def from_labels(vocabulary: Tensor, labels: Sequence[Sequence[int]], length: int, seed: int) -> Tensor:
    """For each label the mean of its tokens' vectors; what is left of `length` is sampled.

    Raises:
        ConfigError: the task has no labels.
    """
    if not labels:
        step = "use --init text for a task without fixed answers"
        raise ConfigError("--init labels", expected="a task with labels", found="none", next_step=step)
    means = [vocabulary[list(label)].float().cpu().mean(dim=0) for label in labels[:length]]
    return torch.cat([torch.stack(means), sampled(vocabulary, length - len(means), seed)])


def uniform(hidden: int, length: int, seed: int, *, low: float = -0.5, high: float = 0.5) -> Tensor:
    """Uniform random numbers: from -0.5 in the paper, from 0 in its code."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(length, hidden).uniform_(low, high, generator=generator)


def from_npy(path: str, hidden: int, length: int) -> Tensor:
    """The array of a .npy file, as the authors' code saves prompts.

    Raises:
        ConfigError: no such file, or an array of another shape.
    """
    try:
        array = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(path, expected="a .npy file", found=str(error).splitlines()[0]) from error
    if array.shape != (length, hidden) or not np.isfinite(array.astype(np.float64)).all():
        found = f"{list(array.shape)}" if array.shape != (length, hidden) else "numbers that are not finite"
        raise ConfigError(path, expected=f"an array of shape {[length, hidden]}", found=found)
    return torch.from_numpy(array.astype(np.float32))
