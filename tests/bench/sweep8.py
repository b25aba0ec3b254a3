"""The case of many prefixes: a sweep of eight against eight runs of ours, in one process and as processes in a row."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixkit.prefix import load
from prefixkit.quickstart import E2E
from prefixkit.training import loop
from prefixkit.training.grid import configs
from prefixkit.training.progress import Silence, Step
from prefixkit.training.sweep import Quiet, sweep
from prefixkit.training.trials import Trial
from tests.bench.rounds import Row, alternate, compare
from tests.bench.shapes import Setting

GRID = {"optimizer.lr": [0.02, 0.05, 0.1, 0.2], "seed": [0, 1]}
QUICK_GRID = {"optimizer.lr": [0.02, 0.1]}
OURS, APART, PROCESSES = "ours", "separate runs in one process", "`prefixkit train`, one after the other"
STEPS = 15
"""Of a run: few, so that the setting-up of every run weighs more than it would; the rate leaves it out."""
AGREE = 1e-4


class _Clock(Silence):
    """When steps happened, and how many real tokens they read."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def on_step(self, step: Step) -> None:
        self.tick(step.tokens)

    def tick(self, tokens: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)

    def measured(self) -> tuple[float, int]:
        """Seconds from the end of the first step to that of the last, and what was read in between."""
        return self.times[-1] - self.times[0], sum(self.tokens[1:])


class _Together(Quiet):
    """The same of a sweep: a tick for each step of all."""

    def __init__(self) -> None:
        self.clock = _Clock()

    def on_trials(self, trials: Sequence[Trial], tokens: int) -> None:
        self.clock.tick(tokens)


class _Ways:
    """Each way trains the same prefixes; `rates` and `losses` are left behind by every turn."""

    def __init__(self, setting: Setting, grid: Mapping[str, Sequence[Any]], steps: int, eval_limit: int) -> None:
        self.grid = grid
        self.settings = {
            "backbone": setting.backbone,
            "data": setting.data,
            "eval_data": str(E2E / "valid.jsonl"),
            "task": "e2e",
            "steps": steps,
            "batch_size": setting.batch_size,
            "device": setting.device,
            "evaluation": {"every": steps, "limit": eval_limit},
        }
        self.threads = setting.threads
        self.rates: dict[str, list[float]] = {OURS: [], APART: []}
        self.losses: dict[str, list[float]] = {}

    def turns(self) -> Mapping[str, Callable[[int], float]]:
        """Each way, which gives its seconds from beginning to end."""
        made = {OURS: self._together, APART: self._apart, PROCESSES: self._processes}
        return {name: _in_folder(way) for name, way in made.items()}

    def _together(self, folder: Path) -> None:
        heard = _Together()
        trials = sweep(self.settings, self.grid, folder / "sweep", listener=heard)
        seconds, tokens = heard.clock.measured()
        self.rates[OURS].append(tokens / seconds)
        self.losses[OURS] = [trial.state.best_loss for trial in trials]

    def _apart(self, folder: Path) -> None:
        self.losses[APART], clocks = [], []
        for config in configs(self.settings, self.grid, folder):
            clocks.append(_Clock())
            self.losses[APART].append(_loss(loop.train(config, listener=clocks[-1])))
        seconds, tokens = (sum(each) for each in zip(*(clock.measured() for clock in clocks), strict=True))
        self.rates[APART].append(tokens / seconds)

    def _processes(self, folder: Path) -> None:
        self.losses[PROCESSES] = []
        for config in configs(self.settings, self.grid, folder):
            given = ["--backbone", config.backbone, "--data", config.data, "--eval-data", str(config.eval_data)]
            given += ["--task", config.task, "--steps", str(config.steps), "--lr", str(config.optimizer.lr)]
            given += ["--batch-size", str(config.batch_size), "--seed", str(config.seed), "--device", config.device]
            given += ["--set", f"evaluation.every={config.evaluation.every}"]
            given += ["--set", f"evaluation.limit={config.evaluation.limit}", "-o", config.output]
            command = [sys.executable, "-c", _COMMAND.format(threads=self.threads), "train", *given]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.losses[PROCESSES].append(_loss(load(config.output)))


# The command line has no option for threads; it must have as many as the others.
_COMMAND = "import torch; torch.set_num_threads({threads}); from prefixkit.cli import main; main()"


def _loss(prefix: Any) -> float:
    return float(prefix.manifest.provenance.metrics["validation_loss"])


def _in_folder(way: Callable[[Path], None]) -> Callable[[int], float]:
    def timed(_: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            way(Path(folder))
            return time.perf_counter() - began

    return timed


def measure(case: str, setting: Setting, *, rounds: int, quick: bool) -> list[Row]:
    """The sweep against both.

    Raises:
        SystemExit: a validation loss that differs by more than 1e-4 of itself.
    """
    steps = 4 if quick else STEPS
    ways = _Ways(setting, QUICK_GRID if quick else GRID, steps, 8 if quick else 64)
    seconds = alternate(ways.turns(), rounds)
    rows = compare(case, f"real tokens a second, steps alone ({steps} each)", ways.rates)
    rows += compare(case, "seconds from beginning to end", seconds)
    for name, losses in ways.losses.items():
        pairs = list(zip(ways.losses[OURS], losses, strict=True))
        worst = max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))
        if abs(worst[0] / worst[1] - 1) > AGREE:
            raise SystemExit(f"{case}: results differ: validation loss {worst[0]} in the sweep, {worst[1]} in {name}")
        if name != OURS:
            rows += compare(case, "validation loss, of the pair furthest apart", {OURS: [worst[0]], name: [worst[1]]})
    return rows
