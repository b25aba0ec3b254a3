"""Many prefixes at once: steps of one sweep against as many runs of PEFT, in a row and at once as processes.

Every prefix has its own seed, batches and optimizer, here and there. Before the first turn each of ours and its
counterpart take some steps on the same batches from the same prefix, and their losses must agree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import IO, Any

import torch

from prefixkit.training import side_by_side
from prefixkit.training.examples import Data
from tests.bench.contenders import Ours, PeftPlain, plain_model
from tests.bench.fresh import build
from tests.bench.rounds import Row, alternate, compare
from tests.bench.shapes import Setting, examples
from tests.bench.speed import AGREE, Amount, Tell, refuse_unequal

ROW, AT_ONCE = "PEFT, one after the other", "PEFT, at once as processes"


def measure(case: str, setting: Setting, amount: Amount, tell: Tell) -> list[Row]:
    """Ours against both.

    Raises:
        SystemExit: the losses after equal steps disagree, so that the work was not the same.
    """
    settings = [replace(setting, seed=seed) for seed in range(amount.prefixes)]
    ours = _Together(settings)
    row = _InARow(settings, ours.all)
    worst = max(zip(ours.losses(amount.equal), row.losses(amount.equal), strict=True), key=_apart)
    rows = compare(case, f"loss after {amount.equal} equal steps, of the pair furthest apart", _pair(worst))
    refuse_unequal(rows, AGREE[setting.dtype])
    tell(f"{case}: losses agree; now {len(settings)} processes")
    with _processes(settings) as processes:
        turns = {
            "ours": lambda number: ours.turn(amount.steps),
            ROW: lambda number: row.turn(number, amount.steps),
            AT_ONCE: lambda number: processes.turn(number, amount.steps),
        }
        rates = alternate(turns, amount.rounds)
    return rows + compare(case, f"real tokens a second, of {len(settings)} prefixes together", rates)


def _apart(pair: tuple[float, float]) -> float:
    return abs(pair[0] / pair[1] - 1)


def _pair(losses: tuple[float, float]) -> dict[str, list[float]]:
    return {"ours": [losses[0]], ROW: [losses[1]]}


class _Together:
    """All of ours, side by side."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        data, backbone = Data(), None
        self.all: list[Ours] = []
        for setting in settings:
            self.all.append(Ours(setting, examples(setting), backbone, data))
            backbone = self.all[0].prepared.backbone
        self.runs = [side_by_side.Run(one.prepared, one.optimizer, one.state) for one in self.all]

    def losses(self, steps: int) -> list[float]:
        """Of each after its first steps."""
        for _ in range(steps):
            done = side_by_side.step(self.runs)
        return [step.loss for step in done]

    def turn(self, steps: int) -> float:
        """Real tokens a second of the next steps."""
        began = time.perf_counter()
        tokens = sum(step.tokens for _ in range(steps) for step in side_by_side.step(self.runs))
        return tokens / (time.perf_counter() - began)


class _InARow:
    """As many runs of PEFT on one copy of the weights."""

    def __init__(self, settings: Sequence[Setting], ours: Sequence[Ours]) -> None:
        model, self.settings = plain_model(settings[0]), settings
        pairs = zip(settings, ours, strict=True)
        self.all = [PeftPlain(setting, model, one.plan, one.prefix) for setting, one in pairs]

    def losses(self, steps: int) -> list[float]:
        """Of each after its first steps, on our batches; from then on it has random ones."""
        found = [[float(one.step(number).loss) for number in range(steps)][-1] for one in self.all]
        for one, setting in zip(self.all, self.settings, strict=True):
            one.plan = one.own_plan(setting, one.plan.examples)
        return found

    def turn(self, number: int, steps: int) -> float:
        """Real tokens a second of one run after the other."""
        began = time.perf_counter()
        numbers = range(number * steps, (number + 1) * steps)
        tokens = sum(step.tokens for one in self.all for step in _steps(one, numbers))
        return tokens / (time.perf_counter() - began)


def _steps(one: Any, numbers: range) -> list[Any]:
    done = [one.step(number) for number in numbers]
    float(done[-1].loss)  # waits for the device
    return done


class _Processes:
    """The same as processes, which wait for a line that says which steps to take and answer how much they read."""

    def __init__(self, all_of_them: Sequence[subprocess.Popen[str]]) -> None:
        self.all = all_of_them
        self.turn(0, 1)

    def turn(self, number: int, steps: int) -> float:
        """Real tokens a second of all, from the word to the last answer."""
        began = time.perf_counter()
        for process in self.all:
            _end(process.stdin).write(f"{number * steps} {(number + 1) * steps}\n")
            _end(process.stdin).flush()
        answers = [_end(process.stdout).readline() for process in self.all]
        if "" in answers:
            raise RuntimeError(f"a process of PEFT ended: {answers.count('')} of {len(answers)}")
        return sum(map(int, answers)) / (time.perf_counter() - began)


def _end(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def _processes(settings: Sequence[Setting]) -> Iterator[_Processes]:
    """All of them, built and warm; they end where their input does."""
    with ExitStack() as stack:
        started = []
        for setting in settings:
            command = [sys.executable, "-m", "tests.bench.sweep16", json.dumps(asdict(setting))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            started.append(stack.enter_context(subprocess.Popen(command, text=True, **pipes)))
        yield _Processes(started)


def main(described: str) -> None:
    setting = Setting(**json.loads(described))
    torch.set_num_threads(setting.threads)
    one = build(setting, "PEFT")
    for line in sys.stdin:
        begin, end = map(int, line.split())
        print(sum(step.tokens for step in _steps(one, range(begin, end))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
