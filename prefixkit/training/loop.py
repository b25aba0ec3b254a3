"""The training loop: backbone(batch, method()) -> loss -> step, until the end, Ctrl-C or no more improvement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixkit import __version__
from prefixkit.backbones.identity import memory_digest
from prefixkit.data.batches import count_truncated
from prefixkit.errors import ConfigError, PrefixkitError
from prefixkit.format.manifest import Manifest, Provenance
from prefixkit.injections import records_of
from prefixkit.methods.autoprompt import AutoPrompt
from prefixkit.methods.method import Method
from prefixkit.methods.with_head import WithHead
from prefixkit.prefix import Prefix, save
from prefixkit.training import checkpoint
from prefixkit.training.adafactor import Adafactor
from prefixkit.training.checkpoint import State
from prefixkit.training.config import OptimizerConfig, TrainConfig, recorded
from prefixkit.training.hotflip import HotFlip
from prefixkit.training.interruption import AtOnce, between_steps
from prefixkit.training.memory import within_memory
from prefixkit.training.objectives import reduced
from prefixkit.training.out_of_memory import OutOfMemoryError
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.processes import processes
from prefixkit.training.progress import Listener, Silence, Step
from prefixkit.training.replicas import replicated
from prefixkit.training.validation import validate
from prefixkit.training.warm_up import warm_up


class DivergenceError(ConfigError):
    """The loss is no longer a number."""


def train(config: TrainConfig, *, resume: bool = False, listener: Listener | None = None) -> Prefix:
    """Train a prefix as `config` says and write it to `config.output`.

    Ctrl-C keeps what was done: the prefix so far is written, the state is kept for `resume`, and the interrupt goes on.
    So does running out of memory.

    Started by torchrun, all its processes train the one prefix; the first of them writes and tells.

    Returns:
        The prefix that was written: the one of the best validation, or the last one without validation data.

    Raises:
        InputError: whatever is wrong with the backbone, the data, the task or the options; nothing is written.
        PrefixkitError: the frozen backbone changed.
    """
    with processes(config.device) as group:
        told = listener if listener is not None and group.first else Silence()
        return complete(prepare(config, group=group), resume=resume, listener=told)


def complete(prepared: Prepared, *, resume: bool, listener: Listener) -> Prefix:
    """Run what was prepared to its end and write it, as `train` does."""
    config, group, optimizer = prepared.config, prepared.group, make_optimizer(prepared)
    prepared.share = replicated(prepared)
    state = checkpoint.restore(prepared, optimizer) if resume else State()
    if cut := count_truncated(prepared.batches.examples):
        told = f"{cut} of {len(prepared.batches.examples)} training examples lost the end of their input"
        listener.on_message(f"{told} to fit {prepared.task.max_length} tokens")
    if prepared.unpacked:
        listener.on_message(prepared.unpacked)
    if not resume and checkpoint.path_of(config.output).exists():
        listener.on_message(f"starting anew: {checkpoint.path_of(config.output)} of an earlier run will be replaced")
    frozen = memory_digest(prepared.backbone.model)
    try:
        with between_steps(listener.on_message) as check, within_memory(prepared, listener):
            warm_up(prepared, prepared.total_steps - state.step, listener)
            run(prepared, optimizer, state, listener, lambda: group.together(check))
    except AtOnce:
        raise
    except (KeyboardInterrupt, OutOfMemoryError) as error:
        if group.first:
            _keep(prepared, optimizer, state, listener)
        # Who ends first is taken for a failure, and the others are killed. Memory may have run out here alone.
        if isinstance(error, KeyboardInterrupt):
            group.wait()
        raise
    if memory_digest(prepared.backbone.model) != frozen:
        raise PrefixkitError(config.backbone, expected="frozen weights", found="weights that changed during training")
    prefix = result(prepared, state)
    if group.first:
        prefix = save(prefix, config.output)
        checkpoint.path_of(config.output).unlink(missing_ok=True)
    return prefix


def _keep(prepared: Prepared, optimizer: torch.optim.Optimizer, state: State, listener: Listener) -> None:
    """Write what a run that was stopped has done."""
    if not state.step:
        listener.on_message("stopped before the first step; nothing was written")
        return
    output, kept = prepared.config.output, checkpoint.save(prepared, optimizer, state)
    save(result(prepared, state), output)
    listener.on_message(f"stopped at step {state.step}; {output} holds the prefix so far, {kept} the state")


def make_optimizer(prepared: Prepared) -> torch.optim.Optimizer:
    """The optimizer of the method's parameters; the backbone's are not in it."""
    settings = prepared.config.optimizer
    assert settings.lr is not None
    if isinstance(prepared.method, AutoPrompt):
        return HotFlip(prepared.method, lr=settings.lr)
    groups = _groups(prepared.method, settings)
    if settings.name == "adafactor":
        return Adafactor(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def _groups(method: Method, settings: OptimizerConfig) -> Any:
    """The parameters of `method`; those of a head beside others have a rate of their own."""
    if not isinstance(method, WithHead) or method.body is None:
        return method.parameters()
    return [
        {"params": list(method.body.parameters())},
        {"params": [method.head_weight, method.head_bias], "peak": settings.head_lr},
    ]


def run(
    prepared: Prepared,
    optimizer: torch.optim.Optimizer,
    state: State,
    listener: Listener,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Step from where `state` stands to the end, validating and keeping checkpoints on the way.

    `check` is called where the state is whole; it may raise to end the run there.

    Raises:
        DivergenceError: the loss is no longer a number.
    """
    while not is_over(prepared, optimizer, state, listener):
        check()
        done = advance(prepared, optimizer, state)
        refuse_divergence(state)
        listener.on_step(done)


def is_over(prepared: Prepared, optimizer: torch.optim.Optimizer, state: State, listener: Listener) -> bool:
    """Whether a run has come to its end; validation and checkpoint, where they are due, come first."""
    evaluation = prepared.config.evaluation
    finished = state.step == prepared.total_steps
    if state.step != state.validated and (finished or state.step % validation_interval(prepared) == 0):
        validate(prepared, state, listener)
        if prepared.group.first:
            checkpoint.save(prepared, optimizer, state)
    if evaluation.patience and state.stale >= evaluation.patience:
        listener.on_message(f"stopped early at step {state.step}: {state.stale} validations without improvement")
        return True
    return finished


def validation_interval(prepared: Prepared) -> int:
    """Steps between validations."""
    return prepared.config.evaluation.every or max(1, prepared.total_steps // 10)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group of parameters `share` of its own peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("peak", optimizer.defaults["lr"]) * share


def advance(prepared: Prepared, optimizer: torch.optim.Optimizer, state: State) -> Step:
    """Do the step that is next."""
    set_rates(optimizer, schedule(state.step, prepared))
    batch = prepared.batches.batch(state.step)
    prepared.heap.make_room(batch.tokens)
    state.last_loss = step(prepared, optimizer, batch, state.step)
    state.step += 1
    return Step(step=state.step, total=prepared.total_steps, loss=state.last_loss, tokens=batch.tokens)


def refuse_divergence(state: State) -> None:
    """Raise DivergenceError where the loss is no longer a number."""
    if not math.isfinite(state.last_loss):
        found = f"{state.last_loss} at step {state.step}"
        raise DivergenceError("training", expected="a finite loss", found=found, next_step="lower --lr")


def schedule(step: int, prepared: Prepared) -> float:
    """The share of the peak learning rate at `step`: a linear warm-up, then a linear decay to zero, or none."""
    warmup = prepared.config.optimizer.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if prepared.config.optimizer.schedule == "constant":
        return 1.0
    return (prepared.total_steps - step) / max(1, prepared.total_steps - warmup)


def step(prepared: Prepared, optimizer: torch.optim.Optimizer, batch: Any, number: int) -> float:
    """One optimizer step, the one of `number`; returns the loss in nats a target token."""
    how, group, tokens = prepared.config.optimizer.loss, prepared.group, batch.target_tokens
    total = _total(prepared, batch) if prepared.share is None else prepared.share(number)
    # Going backward in several processes leaves the mean of their gradients, where the sum is wanted.
    loss = reduced(total, how=how, tokens=tokens / group.size, examples=batch.examples / group.size)
    loss.backward()  # type: ignore[no-untyped-call]
    update(prepared, optimizer, number)
    return float(group.summed(total.item())[0] / tokens)


def _total(prepared: Prepared, batch: Any) -> Tensor:
    """The summed loss of a batch in nats."""
    return prepared.objective(prepared.backbone, batch, prepared.method())


def update(prepared: Prepared, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Let the optimizer follow the gradients of step `number`, clipped, and forget them."""
    torch.nn.utils.clip_grad_norm_(prepared.method.parameters(), prepared.config.optimizer.max_grad_norm)
    if isinstance(optimizer, HotFlip):
        following = prepared.batches.batch(number + 1)
        optimizer.step(torch.no_grad()(lambda: float(_total(prepared, following))))
    else:
        optimizer.step()
    optimizer.zero_grad()


def result(prepared: Prepared, state: State) -> Prefix:
    """The prefix of `state`, folded, with its manifest."""
    latest = {name: tensor.clone() for name, tensor in prepared.method.state_dict().items()}
    checkpoint.best_method(prepared.method, state)
    folded = prepared.method.fold()
    prepared.method.load_state_dict(latest)
    metrics = {"steps": float(state.best_step or state.step)}
    if state.best is not None:
        metrics["validation_loss"] = state.best_loss
        if prepared.config.evaluation.metric == "score":
            metrics["validation_score"] = state.best_score
    elif state.step:
        metrics["training_loss"] = state.last_loss
    config = prepared.config
    provenance = Provenance(
        method=config.method.name,
        prefixkit=__version__,
        config=recorded(config),
        seed=config.seed,
        data_hash=prepared.data_hash,
        metrics=metrics,
        parents=prepared.parents,
    )
    manifest = Manifest(
        backbone=prepared.backbone.identity,
        injections=records_of(folded),
        provenance=provenance,
        task=prepared.task,
    )
    return Prefix(manifest, folded.arrays())
