"""What a run will need, before it begins: the backbone's weights, what is trained, and what a step keeps and works in.

What a step keeps is measured on two and on three rows, as wide as the longest example, and goes on in a straight line.
Beside it stand the logits of a part of the targets (see `prefixkit.backbones.targets`), or what a layer works in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.kept import Kept, kept
from prefixkit.backbones.onednn import laid_out_bytes
from prefixkit.backbones.targets import ELEMENTS, most
from prefixkit.methods.autoprompt import AutoPrompt
from prefixkit.methods.method import Method
from prefixkit.training import layout
from prefixkit.training.examples import collate_for
from prefixkit.training.free_memory import free_memory
from prefixkit.training.out_of_memory import SMALLER, in_a_line, ran_out
from prefixkit.training.preparation import Prepared
from prefixkit.training.progress import Listener

_LOGITS = 3 * 4
"""Bytes for each logit of a part: they, their logarithms and their gradients, in float32."""
_GRADIENTS = 0.5
"""What a layer's gradients take, in what the layer leaves: measured, 0.3 to 0.6."""
_COPIES = 3
"""Tensors of a trained parameter's size: itself and two that AdamW keeps. Gradients come when what was kept goes."""
_NOTHING_FITS = "use shorter texts, --dtype bfloat16 or a smaller backbone"
_MARGIN = 1.2
"""What a process takes for what its tensors need: packed copies of matrices, and pieces that are too small."""
_UNKNOWN = "memory: too little to measure what a step will need"
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """The memory of a run in bytes, at the worst of its steps.

    Attributes:
        weights: of the backbone, which is in memory already.
        trained: parameters, gradients and optimizer state.
        once, row: what a step keeps, whatever its batch, and for each row of it.
        logits: how many a row has, of all its targets.
        part: how many of them are there at once, at most.
        laid_out: of weights that are kept in another order as well.
        rows: of the largest batch.
        recomputes: whether layers are computed again.
        packable: whether its padding could be left out.
        trials: of a sweep, whose batches are read together.
        free: on the device beside the weights; None where nobody says.
    """

    weights: int
    trained: int
    once: Kept
    row: Kept
    logits: int
    rows: int
    recomputes: bool
    packable: bool
    free: int | None
    part: int = ELEMENTS["cpu"]
    laid_out: int = 0
    trials: int = 1

    def step(self, rows: int, *, recomputes: bool) -> int:
        """What a step of so many rows needs beside the weights."""
        working = _LOGITS * min(self.part, rows * self.logits)
        layer = self.once.layer + rows * self.row.layer
        gradients, beside = int(_GRADIENTS * layer), self.trained + self.laid_out
        if not recomputes:
            return beside + self.once.plainly + rows * self.row.plainly + max(working, gradients)
        return beside + self.once.recomputed + rows * self.row.recomputed + max(working, layer + gradients)

    @property
    def needed(self) -> int:
        """What the run's largest step needs beside the weights."""
        return self.step(self.rows, recomputes=self.recomputes)

    @property
    def fits(self) -> bool:
        """Whether that is free, as far as anybody knows."""
        return self.needed <= self._room

    def most(self, *, recomputes: bool) -> int:
        """The largest batch, up to the run's own, that fits; 0 where none does."""
        fitting = (rows for rows in range(self.rows, 0, -1) if self.step(rows, recomputes=recomputes) <= self._room)
        return next(fitting, 0)

    @property
    def _room(self) -> float:
        return float("inf") if self.free is None else self.free / _MARGIN

    def told(self) -> str:
        """A line for the user."""
        rows = f"{self.rows} rows" if self.trials == 1 else f"{self.rows} rows of {self.trials} trials"
        line = f"memory: about {size(self.needed)} for {rows}, beside {size(self.weights)} of the backbone"
        line += "" if self.free is None else f"; {size(self.free)} free"
        return line if self.fits else f"{line}, which may not be enough: {self.advice()}"

    def advice(self) -> str:
        """What to do where it is too much."""
        fitting = self.most(recomputes=self.recomputes)
        # Free memory may lie in pieces: what did not fit does not fit.
        fitting = (self.rows // 2 if fitting == self.rows else fitting) // self.trials
        found = [f"--batch-size {fitting}"] if fitting else []
        if not self.recomputes and (rows := self.most(recomputes=True)) >= self.trials:
            fewer = "" if rows == self.rows else f" --batch-size {rows // self.trials}"
            found.append(f"--gradient-checkpointing{fewer}")
        if self.packable:
            found.append("--set layout=packed")
        return f"use {' or '.join(found)}" if found else _NOTHING_FITS


def size(count: int) -> str:
    """A number of bytes, to be read."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / (1 << 20):.1f} MiB"


@contextmanager
def within_memory(prepared: Prepared, listener: Listener) -> Iterator[None]:
    """Steps of a run in a `with` block: what they will need is told first, and what to do where it is not there.

    Raises:
        OutOfMemoryError: it is not there.
    """
    if not prepared.total_steps:
        yield
        return
    # What lies in several processes is not looked at from one.
    needs = None if prepared.config.shard else tell(lambda: estimate(prepared), listener)
    rows = f"memory for a step of {largest_batch(prepared) if needs is None else needs.rows} rows"
    with in_a_line("training", rows, lambda: SMALLER if needs is None else needs.advice()):
        yield


def tell(measure: Callable[[], Estimate], listener: Listener) -> Estimate | None:
    """Tell the estimate that `measure` makes, and give it.

    None where even a few rows are too much to measure: layers that are computed again may take less yet.
    """
    try:
        needs = measure()
    except Exception as error:
        if not ran_out(error):
            raise
        listener.on_message(_UNKNOWN)
        return None
    listener.on_message(needs.told())
    return needs


def estimate(prepared: Prepared) -> Estimate:
    """What the run will need, from two small passes; nothing of the run changes."""
    once, row = _once_and_each_row(_kept(prepared, 2), _kept(prepared, 3))
    backbone = prepared.backbone
    batch = collate_for(prepared.task, backbone)([max(prepared.batches.examples, key=len)])
    words = prepared.task.answer is None
    return Estimate(
        weights=_bytes(backbone.model),
        trained=trained_bytes(prepared.method),
        once=once,
        row=row,
        logits=batch.target_tokens * backbone.identity.vocab_size if words else 0,
        rows=largest_batch(prepared),
        recomputes=prepared.config.gradient_checkpointing,
        packable=_packable(prepared),
        free=free_memory(backbone.device),
        part=most(backbone.device, backbone.identity.vocab_size),
        laid_out=laid_out_bytes(backbone.model),
    )


def _kept(prepared: Prepared, rows: int) -> Kept:
    examples = sorted(prepared.batches.examples, key=len)
    # The first one is padded: a batch without padding needs no mask of its own.
    batch = collate_for(prepared.task, prepared.backbone)([examples[0], *[examples[-1]] * (rows - 1)])

    def forward() -> Tensor:
        return prepared.objective(prepared.backbone, batch, prepared.method())

    with _reading_apart(prepared.backbone):
        return kept(prepared.backbone.model, forward)


@contextmanager
def _reading_apart(backbone: Backbone) -> Iterator[None]:
    """In a `with` block rows share nothing, as those of a run may not, even where they are one and the same."""
    shares, backbone.shares_beginnings = backbone.shares_beginnings, False
    try:
        yield
    finally:
        backbone.shares_beginnings = shares


def _once_and_each_row(two: Kept, three: Kept) -> tuple[Kept, Kept]:
    row = Kept(three.plainly - two.plainly, three.recomputed - two.recomputed, three.layer - two.layer)
    return Kept(two.plainly - 2 * row.plainly, two.recomputed - 2 * row.recomputed, two.layer - 2 * row.layer), row


def largest_batch(prepared: Prepared) -> int:
    """How many rows of the longest example the largest batch is worth."""
    batches = prepared.batches
    processes = prepared.group.size
    if not layout.packs(batches.collate):
        return -(-min(batches.batch_size, len(batches.examples)) // processes)
    steps = range(batches.steps_per_epoch)
    tokens = max(sum(len(batches.examples[index]) for index in batches.indices(step)) for step in steps)
    return -(-tokens // (processes * max(map(len, batches.examples))))


def _packable(prepared: Prepared) -> bool:
    """Whether rows are padded where a packed row would be no slower; see `prefixkit.training.layout`."""
    if prepared.backbone.device.type != "cuda" or layout.packs(prepared.batches.collate):
        return False
    return layout.obstacle(prepared.task, prepared.backbone, (prepared.method(), prepared.method.teacher)) is None


def trained_bytes(method: Method) -> int:
    """Bytes of what a method trains, and of what its optimizer keeps of that."""
    trained = sum(weight.nbytes for weight in method.parameters() if weight.requires_grad)
    # Whoever searches among tokens follows no gradient.
    return _bytes(method) + (0 if isinstance(method, AutoPrompt) else (_COPIES - 1) * trained)


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
