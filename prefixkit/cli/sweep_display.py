"""A sweep as a person sees it: a table of its trials that keeps changing, or plain lines in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from prefixkit.training.progress import Step, Validation
from prefixkit.training.trials import Trial

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_TABLES = 0.5


class SweepDisplay:
    """A listener that draws on standard error."""

    def __init__(self) -> None:
        # Settings are shown as they are, whatever brackets and colons they have.
        self.console = Console(stderr=True, markup=False, emoji=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.tokens, self.started, self.drawn = 0, 0.0, 0.0

    def __enter__(self) -> SweepDisplay:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def on_trials(self, trials: Sequence[Trial], tokens: int) -> None:
        """Redraw the table, or print a line, now and then."""
        now = time.monotonic()
        if not self.started:
            self.started, tokens = now, 0
        self.tokens += tokens
        terminal = self.console.is_terminal
        if now - self.drawn < (_SECONDS_BETWEEN_TABLES if terminal else _SECONDS_BETWEEN_LINES):
            return
        self.drawn = now
        speed = self.tokens / (now - self.started) if now > self.started else 0.0
        if terminal:
            self.live.update(_table(trials, f"{speed:,.0f} tok/s"), refresh=True)
        else:
            self.console.print(_line(trials, speed), highlight=False, soft_wrap=True)

    def on_step(self, step: Step) -> None:
        """Nothing: `on_trials` shows it."""

    def on_validation(self, validation: Validation) -> None:
        """Nothing: `on_trials` shows it."""

    def on_message(self, message: str) -> None:
        """One line."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def table_of(self, trials: Sequence[Trial]) -> None:
        """The table of the trials as they ended, the best first."""
        self.console.print(_table(sorted(trials, key=lambda trial: trial.score), ""))


def _line(trials: Sequence[Trial], speed: float) -> str:
    live = [trial for trial in trials if trial.status == "running"]
    best = min(trials, key=lambda trial: trial.score)
    reached = max((trial.state.step for trial in live), default=0)
    loss = f"{best.state.best_loss:.4f} by trial {best.number}" if math.isfinite(best.state.best_loss) else "none yet"
    return f"step {reached}  {len(live)} of {len(trials)} trials  {speed:,.0f} tok/s  best validation loss {loss}"


def _table(trials: Sequence[Trial], caption: str) -> Table:
    keys = list(trials[0].point)
    table = Table(caption=caption, box=None, pad_edge=False)
    for name in ("trial", *keys, "step", "loss", "validation", "status"):
        table.add_column(name, justify="left" if name in (*keys, "status") else "right")
    for trial in trials:
        state, total = trial.state, trial.prepared.total_steps
        best = f"{state.best_loss:.4f}" if math.isfinite(state.best_loss) else "-"
        loss = f"{state.last_loss:.3f}" if math.isfinite(state.last_loss) else "-"
        own = (str(trial.point[key]) for key in keys)
        table.add_row(str(trial.number), *own, f"{state.step}/{total}", loss, best, trial.status)
    return table
