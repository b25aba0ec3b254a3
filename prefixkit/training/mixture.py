"""Mixtures of prompts: several patterns for one relation, each with its own prompt, weighted by EM (Qin & Eisner 2021).

p(y | x) = sum over j of w_j p(y | pattern j, x). A step's loss is the negative logarithm of that, whose gradient is the
responsibility of each pattern times its own; after each pass over the data the weights become the mean
responsibilities.
A file holds one pattern. What a mixture is more than its files are its weights, which each file's provenance keeps as
`mixture_weight`; `prefixkit eval --mixture` puts them together, and nothing else serves a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixkit.backbones.identity import memory_digest
from prefixkit.errors import ConfigError, PrefixkitError
from prefixkit.prefix import Prefix, save
from prefixkit.settings import check_types, records
from prefixkit.training import loop
from prefixkit.training.checkpoint import State
from prefixkit.training.classification import log_likelihoods
from prefixkit.training.config import TrainConfig, files_of, from_mapping
from prefixkit.training.out_of_memory import SMALLER, in_a_line
from prefixkit.training.output import check_outputs
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.processes import refuse_several
from prefixkit.training.progress import Listener, Silence, Step


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One of several patterns.

    Attributes:
        task: its template.
        init: where its prompt starts; None as the whole run says.
    """

    task: str
    output: str
    init: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "patterns.")


def patterns_from(settings: Mapping[str, Any], where: str) -> list[TrainConfig]:
    """A run for each of the `[[patterns]]` in `settings`, alike but for template, start and output.

    Raises:
        ConfigError: no pattern, or settings that are none.
    """
    shared = {key: value for key, value in settings.items() if key != "patterns"}
    patterns = records(Pattern, settings["patterns"], f"{where} [[patterns]]")
    if not patterns or "output" in shared:
        found = "an output beside them" if patterns else "none"
        raise ConfigError(where, expected="[[patterns]], each with an output of its own", found=found)
    return [_run(shared, pattern, where) for pattern in patterns]


def _run(shared: Mapping[str, Any], pattern: Pattern, where: str) -> TrainConfig:
    method = shared.get("method", {})
    if not isinstance(method, Mapping):
        raise ConfigError(where, expected='a section [method] with name = "…"', found=repr(method))
    method = dict(method)
    if pattern.init is not None:
        method["init"] = pattern.init
    return from_mapping({**shared, "task": pattern.task, "output": pattern.output, "method": method}, where)


def train_mixture(configs: Sequence[TrainConfig], listener: Listener | None = None) -> list[Prefix]:
    """Train the prompts of all patterns together and write each with its weight in the mixture.

    Raises:
        InputError: whatever is wrong with one of them.
        PrefixkitError: the frozen backbone changed.
    """
    refuse_several("a mixture")
    listener = listener or Silence()
    prepared = _prepared(configs)
    frozen = memory_digest(prepared[0].backbone.model)
    with in_a_line("[[patterns]]", "memory for a step", lambda: SMALLER):
        weights, loss = _fit(prepared, listener)
    if memory_digest(prepared[0].backbone.model) != frozen:
        raise PrefixkitError(configs[0].backbone, expected="frozen weights", found="weights that changed in training")
    written = []
    for one, weight in zip(prepared, weights.tolist(), strict=True):
        made = loop.result(one, State(step=one.total_steps, last_loss=loss))
        metrics = {**made.manifest.provenance.metrics, "mixture_weight": weight}
        provenance = replace(made.manifest.provenance, metrics=metrics)
        written.append(save(Prefix(replace(made.manifest, provenance=provenance), made.tensors), one.config.output))
        listener.on_message(f"wrote {one.config.output}, weight {weight:.3f}")
    return written


def _prepared(configs: Sequence[TrainConfig]) -> list[Prepared]:
    prepared: list[Prepared] = []
    reads = [path for config in configs for path in files_of(config)]
    check_outputs([config.output for config in configs], reads, configs[0].backbone, "[[patterns]]")
    for config in configs:
        prepared.append(prepare(config, prepared[0].backbone if prepared else None))
        if prepared[-1].task.answer is not None or prepared[-1].method.teacher is not None:
            step = "use a task whose answer is a word"
            raise ConfigError("[[patterns]]", expected="patterns that words answer", found=config.task, next_step=step)
        labels, first = (list(one.task.verbalizer or ()) for one in (prepared[-1], prepared[0]))
        if labels != first:
            found = ", ".join(labels) or "none"
            raise ConfigError(config.task, expected=f"the labels of {configs[0].task}: {', '.join(first)}", found=found)
    return prepared


def _fit(prepared: Sequence[Prepared], listener: Listener) -> tuple[Tensor, float]:
    """The weights [patterns] after the last step, and its loss in nats an example."""
    first = prepared[0]
    weights = torch.full((len(prepared),), 1 / len(prepared))
    optimizer = loop.make_optimizer(first)
    for one in prepared[1:]:
        optimizer.add_param_group({"params": list(one.method.parameters())})
    seen: list[Tensor] = []
    loss = float("nan")
    for number in range(first.total_steps):
        loop.set_rates(optimizer, loop.schedule(number, first))
        indices = first.batches.indices(number)
        joint = _joint(prepared, indices, weights)
        seen.append(torch.softmax(joint.detach(), dim=1))
        total = -torch.logsumexp(joint, dim=1).mean()
        total.backward()  # type: ignore[no-untyped-call]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, first.config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % first.batches.steps_per_epoch == 0:
            weights, seen = torch.cat(seen).mean(dim=0), []
        loss = total.item()
        listener.on_step(Step(step=number + 1, total=first.total_steps, loss=loss, tokens=_tokens(prepared, indices)))
    return weights, loss


def _joint(prepared: Sequence[Prepared], indices: Sequence[int], weights: Tensor) -> Tensor:
    """[examples, patterns]: the logarithm of each pattern's weight times the likelihood of the answer by it."""
    likelihoods = []
    for one in prepared:
        batch = one.batches.collate([one.batches.examples[index] for index in indices])
        likelihoods.append(log_likelihoods(one.backbone, batch, one.method()))
    return torch.stack(likelihoods, dim=1) + weights.log()


def _tokens(prepared: Sequence[Prepared], indices: Sequence[int]) -> int:
    return sum(len(one.batches.examples[index]) for one in prepared for index in indices)
