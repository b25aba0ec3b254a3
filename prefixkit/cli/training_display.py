"""A training run as a person sees it: a bar with loss, tokens a second and time left, or plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from prefixkit.training.progress import Step, Validation

_SMOOTHING = 0.95
_SECONDS_BETWEEN_LINES = 10.0


class TrainingDisplay:
    """A listener that draws on standard error."""

    def __init__(self, *, shown: bool = True) -> None:
        # Names of files are told as they are, whatever brackets and colons they have.
        self.console = Console(stderr=True, quiet=not shown, markup=False, emoji=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("starting", total=None, loss="-", speed="-")
        self.loss: float | None = None
        self.tokens, self.first_step, self.last_step, self.started, self.printed = 0, 0, 0, 0.0, 0.0

    def __enter__(self) -> TrainingDisplay:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Stopping a bar that never started prints an empty line.
        if self.console.is_terminal:
            self.bar.stop()

    def on_step(self, step: Step) -> None:
        """Smooth the loss, count tokens, and redraw."""
        now = time.monotonic()
        if step.step != self.last_step + 1:
            self._begin_anew()
        self.last_step = step.step
        if not self.started:
            self.started, self.first_step = now, step.step
        else:
            self.tokens += step.tokens
        self.loss = step.loss if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * step.loss
        speed = self.tokens / (now - self.started) if now > self.started else 0.0
        if self.console.is_terminal:
            self.bar.update(
                self.task,
                description=f"step {step.step}/{step.total}",
                completed=step.step,
                total=step.total,
                loss=f"{self.loss:.3f}",
                speed=f"{speed:,.0f}",
            )
        elif now - self.printed > _SECONDS_BETWEEN_LINES or step.step == step.total:
            self.printed = now
            self._line(step, speed, now)

    def on_validation(self, validation: Validation) -> None:
        """One line a validation."""
        told = f"step {validation.step}: validation loss {validation.loss:.4f}"
        told += "" if validation.score is None else f", score {validation.score:.2f}"
        self.console.print(told + (" (best)" if validation.best else ""), highlight=False)

    def on_message(self, message: str) -> None:
        """One line."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def _begin_anew(self) -> None:
        """Another run of the same command has a loss and a speed of its own."""
        self.loss, self.tokens, self.started, self.printed = None, 0, 0.0, 0.0

    def _line(self, step: Step, speed: float, now: float) -> None:
        done = step.step - self.first_step
        text = f"step {step.step}/{step.total}  loss {self.loss:.3f}"
        if done:
            left = (now - self.started) / done * (step.total - step.step)
            text += f"  {speed:,.0f} tok/s  {left:.0f} s left"
        self.console.print(text, highlight=False)


@contextmanager
def progress_of(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal for `total` things; the function that is yielded hears how many are done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def quiet_transformers() -> None:
    """Keep the loading bars and advice of transformers off the screen; our own errors say what matters."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # It recommends faster kernels for a CPU.
    getLogger("bitsandbytes").setLevel(ERROR)
