"""Arms of a comparison: each with its own learning rate, chosen on validation data, and scored on test data by seeds.

The examples that compare import it. Every arm is trained for equal steps, with equal batches, and tries equally many
rates; what is scored is the last step, so that no arm gains from being looked at more often.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from transformers.utils import logging

from prefixkit.backbones.load import load_backbone
from prefixkit.injections import injection
from prefixkit.task import load_tokenizer
from prefixkit.training.config import EvaluationConfig, OptimizerConfig, TrainConfig, method_settings
from prefixkit.training.loop import complete, schedule, set_rates
from prefixkit.training.objectives import reduced
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.progress import Silence
from prefixkit.training.scoring import Scoring, score

FULL = "full fine-tuning"


@dataclass(frozen=True)
class Arm:
    """What is trained, and the rates that are tried.

    Attributes:
        method: its settings, `name` among them; those of the head alone for full fine-tuning.
    """

    name: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training run: its scores on both files, and how many numbers it trained."""

    rate: float
    validation: float
    test: float
    trained: int


@dataclass(frozen=True)
class Comparison:
    """A backbone, a task and how long to train.

    Attributes:
        data: the files of training, validation and test data for a seed.
        metric: of the task, as `prefixkit eval` names it.
        searched: how many of the seeds each rate is tried with.
        head_rate: of a head beside something else, in every arm; a head alone is given the rates of its arm.
    """

    backbone: str
    task: str
    data: Callable[[int], tuple[str, str, str]]
    metric: str
    steps: int
    batch_size: int
    seeds: int
    searched: int
    head_rate: float
    folder: str

    def config(self, arm: Arm, rate: float, seed: int) -> TrainConfig:
        """The run of `arm` at `rate`."""
        training, _, _ = self.data(seed)
        return TrainConfig(
            backbone=self.backbone,
            data=training,
            output=f"{self.folder}/prefix.safetensors",
            task=self.task,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
            device="cpu",
            method=method_settings(arm.method),
            optimizer=OptimizerConfig(lr=rate, head_lr=self.head_rate, warmup_steps=self.steps // 10),
            evaluation=EvaluationConfig(every=self.steps),
        )


def table(comparison: Comparison, arms: Sequence[Arm]) -> Iterator[str]:
    """The rows of a Markdown table, as they come."""
    logging.disable_progress_bar()
    yield f"| what is trained | numbers | rate | validation | test {comparison.metric} | by seed |"
    yield "|---|---|---|---|---|---|"
    for arm in arms:
        runs = best_rate(comparison, arm)
        first, each = runs[0], ", ".join(f"{run.test:.1f}" for run in runs)
        edge = " (edge)" if len(arm.rates) > 1 and first.rate in (min(arm.rates), max(arm.rates)) else ""
        validation, test = ([getattr(run, name) for run in runs] for name in ("validation", "test"))
        scores = f"{spread(validation)} | {spread(test)} | {each}"
        yield f"| {arm.name} | {first.trained:,} | {first.rate:g}{edge} | {scores} |"


def best_rate(comparison: Comparison, arm: Arm) -> list[Run]:
    """The runs of all seeds at the rate with the best mean validation score over the searched ones."""
    tried = {rate: [run(comparison, arm, rate, seed) for seed in range(comparison.searched)] for rate in arm.rates}
    best = max(tried, key=lambda rate: mean(one.validation for one in tried[rate]))
    rest = range(comparison.searched, comparison.seeds)
    return tried[best] + [run(comparison, arm, best, seed) for seed in rest]


def spread(numbers: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    apart = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{apart}"


def run(comparison: Comparison, arm: Arm, rate: float, seed: int) -> Run:
    """Train and score once."""
    prepared = prepare(comparison.config(arm, rate, seed), load_backbone(comparison.backbone))
    trained = sum(parameter.numel() for parameter in prepared.method.parameters())
    if arm.name == FULL:
        trained += fine_tune(prepared)
        received = prepared.method.fold()
    else:
        received = injection(complete(prepared, resume=False, listener=Silence()))
    _, validation, test = comparison.data(seed)
    scores = [_scored(prepared, path, received, comparison.metric) for path in (validation, test)]
    told = f"{arm.name}, rate {rate:g}, seed {seed}: {scores[0]:.2f} validation, {scores[1]:.2f} test"
    print(told, file=sys.stderr, flush=True)
    return Run(rate, scores[0], scores[1], trained)


def fine_tune(prepared: Prepared) -> int:
    """Train the backbone itself beside the head; gives the number of the backbone's parameters."""
    settings, model = prepared.config.optimizer, prepared.backbone.model.requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": list(model.parameters())},
        {"params": list(prepared.method.parameters()), "peak": settings.head_lr},
    ]
    assert settings.lr is not None
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
    everything = [parameter for group in groups for parameter in group["params"]]
    for number in range(prepared.total_steps):
        set_rates(optimizer, schedule(number, prepared))
        batch = prepared.batches.batch(number)
        total = prepared.objective(prepared.backbone, batch, prepared.method())
        reduced(total, how="mean", tokens=batch.target_tokens, examples=batch.examples).backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    return sum(parameter.numel() for parameter in model.parameters())


def _scored(prepared: Prepared, path: str, received: Any, metric: str) -> float:
    backbone, task = prepared.backbone, prepared.task
    tokenizer = None if task.image is not None else load_tokenizer(backbone.folder)
    metrics = score(backbone, task, tokenizer, path, [received], Scoring(progress=_silent, batch_size=64)).metrics
    return metrics[metric]


@contextmanager
def _silent(name: str, count: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None
