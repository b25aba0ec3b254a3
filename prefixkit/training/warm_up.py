"""Before the first step: the fast ways to compute it, tried on a real batch and held against the plain one.

The plain way is padded rows and `transformers` as it stands. A packed row and a compiled pass must give its loss, or
are left alone: what a compiler or a kernel of some machine gets wrong is seen before anything is trained with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prefixkit.backbones.attention import uses_registry
from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.compiled import compile_stacks, restore_stacks
from prefixkit.data.packing import BUCKET
from prefixkit.errors import ConfigError, InputError
from prefixkit.training import layout
from prefixkit.training.examples import collate_for
from prefixkit.training.out_of_memory import ran_out
from prefixkit.training.preparation import Prepared
from prefixkit.training.progress import Listener

BACKEND = "inductor"
WORTH = 100
"""Steps left from which compiling pays on CUDA: it takes about as long as so many plain ones (a minute)."""
LONGEST = 200
"""Letters of a compiler's message that are shown."""
LAUNCH_BOUND = 1 << 12
"""Tokens of a mean batch below which a GPU waits for its instructions, which a CUDA graph spares it."""
SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a loss may be from the plain one, relatively: the rounding of other kernels."""


def warm_up(prepared: Prepared, steps: int, listener: Listener, *, beside: bool = False) -> None:
    """Settle how the batches of a run with so many `steps` to go are computed, and compile.

    Where settings leave a choice, what does not work is left alone, with a sentence that says why.

    Args:
        beside: whether rows of other runs will stand beside its own.

    Raises:
        ConfigError: what settings ask for does not work.
    """
    compiles = wants_compiled(prepared, steps, listener)
    packs = prepared.config.layout == "auto" and layout.packs(prepared.batches.collate)
    if not compiles and not packs:
        return
    plain = collate_for(prepared.task, prepared.backbone)
    expected = _loss_of(prepared, plain)
    if compiles and (reason := _compiled(prepared, expected, listener, beside)) is not None:
        restore_stacks(prepared.backbone.model)
        _give_up(prepared, reason, listener)
        compiles = False
    if packs and not compiles and (reason := _differs(prepared, expected, beside)) is not None:
        prepared.batches.collate = plain
        listener.on_message(f"batches are padded: {reason}")


def wants_compiled(prepared: Prepared, steps: int, listener: Listener) -> bool:
    """Whether a run with so many `steps` to go is to be compiled.

    Raises:
        ConfigError: it is asked for, and the model is known not to compile.
    """
    choice, backbone = prepared.config.compile, prepared.backbone
    if choice == "off" or (choice == "auto" and not pays(backbone, steps)):
        return False
    if (reason := _obstacle(prepared)) is None:
        return True
    _give_up(prepared, reason, listener)
    return False


def _obstacle(prepared: Prepared) -> str | None:
    backbone = prepared.backbone
    if prepared.config.shard:
        return "its layers are spread over several processes"
    if prepared.config.gradient_checkpointing:
        return "its layers are computed again on the way back"
    if backbone.paired or uses_registry(backbone.model):
        return None
    return f"{backbone.identity.family} takes a prefix through a cache, which grows as it is read"


def pays(backbone: Backbone, steps: int) -> bool:
    """Whether compiling saves more time than it takes."""
    return backbone.device.type == "cuda" and steps >= WORTH


def _give_up(prepared: Prepared, reason: str, listener: Listener) -> None:
    if prepared.config.compile == "on":
        expected, step = "a model that torch.compile can take", "use --compile off"
        raise ConfigError("--compile", expected=expected, found=reason, next_step=step)
    listener.on_message(f"not compiled: {reason}")


def _compiled(prepared: Prepared, expected: float, listener: Listener, beside: bool) -> str | None:
    """Compile; gives why that does not work, or None."""
    listener.on_message("compiling the frozen model; the first step follows in about a minute")
    began, backbone = time.monotonic(), prepared.backbone
    compile_stacks(backbone.model, backend=BACKEND, mode=_mode(backbone, prepared, beside))
    reason = _differs(prepared, expected, beside)
    if reason is None:
        listener.on_message(f"compiled in {time.monotonic() - began:.0f} s")
    return reason


def _mode(backbone: Backbone, prepared: Prepared, beside: bool) -> str | None:
    """What torch.compile is asked for. Batches differ: what they hold in the mean decides, and not one of them.

    Rows of several runs together are long, and their length seldom comes again: no graph of one is worth recording.
    """
    batches = prepared.batches
    tokens = sum(map(len, batches.examples)) / (batches.steps_per_epoch * prepared.group.size)
    tokens += BUCKET / 2 if layout.packs(batches.collate) else 0  # what fills up a packed row
    if backbone.device.type != "cuda" or beside or tokens >= LAUNCH_BOUND:
        return None
    return "reduce-overhead"


def _differs(prepared: Prepared, expected: float, beside: bool) -> str | None:
    """What is wrong with the loss of the first batch as it is computed now, and with its gradients; None if nothing."""
    try:
        found = _loss_of(prepared, prepared.batches.collate, gradients=True, beside=beside)
    except InputError:
        raise
    except Exception as error:  # compilers raise many unrelated types
        if ran_out(error):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
    tolerance = SAME[prepared.backbone.model.dtype]
    if not abs(found - expected) <= tolerance * abs(expected):
        return f"the first batch has a loss of {found:.6g} there, and of {expected:.6g} as it is plainly computed"
    return None


def _loss_of(
    prepared: Prepared, collate: Callable[..., Any], *, gradients: bool = False, beside: bool = False
) -> float:
    """The loss of the first batch, in nats a target token."""
    batches = prepared.batches
    batch = collate([batches.examples[index] for index in batches.indices(0)])
    with torch.set_grad_enabled(gradients):
        received: Any = prepared.method()
        # What a head reads is laid out behind it, run by run.
        if beside and prepared.task.answer is None:
            received = layout.laid_each(prepared.backbone, batch, received)
        loss = prepared.objective(prepared.backbone, batch, received)
        if gradients:
            _refuse_none(torch.autograd.grad(loss, _trained(prepared.method), allow_unused=True))
    return float(loss.item() / batch.target_tokens)


def _trained(method: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def _refuse_none(gradients: Iterable[Tensor | None]) -> None:
    if all(gradient is None for gradient in gradients):
        raise RuntimeError("no gradient reaches the prefix")
