"""One case of training speed: the same work checked first, then rounds, then each contender by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from tests.bench import fresh
from tests.bench.contenders import OURS_COMPILED, PEERS, Ours, Peer, PeftCompiled, plain_model
from tests.bench.rounds import Row, alternate, compare
from tests.bench.shapes import Setting, examples

BEST = "PEFT at its best"
COMPILED = f"{BEST}, compiled"
AGREE = {"float32": 1e-3, "bfloat16": 3e-2}
"""How far losses after equal steps may be apart, relatively: the rounding of other kernels, through AdamW."""


@dataclass(frozen=True)
class Amount:
    """How much is measured.

    Attributes:
        rounds: of every contender in turn.
        steps: of a turn.
        equal: steps on the same batches before the first turn, after which losses must agree.
        fresh: processes for memory and the time to the first step, a contender; 0 leaves these out.
        compiled: whether torch.compile is tried for PEFT at its best; it takes minutes on a CPU.
        epochs: of a run on the wall clock.
        held_out: validation examples of such a run, at most.
        prefixes: of a sweep.
    """

    rounds: int
    steps: int
    equal: int
    fresh: int
    compiled: bool = True
    epochs: float = 5.0
    held_out: int = 512
    prefixes: int = 16


Tell = Callable[[str], None]


def measure(case: str, setting: Setting, amount: Amount, tell: Tell) -> list[Row]:
    """Ours against every peer.

    Raises:
        SystemExit: the losses after equal steps disagree, so that the work was not the same.
    """
    found = _Contenders(setting, amount, tell)
    rows = compare(case, f"loss after {amount.equal} equal steps", found.agree(amount.equal))
    refuse_unequal(rows, AGREE[setting.dtype])
    found.choose_best(amount.steps)
    rates = alternate({name: found.turn(name, amount.steps) for name in found.all}, amount.rounds)
    rows += compare(case, "real tokens a second", rates)
    names, begun = list(found.all), found.next_step
    compiled = isinstance(found.all[BEST], PeftCompiled)
    del found
    tell(f"{case}: {begun} steps each; now each contender in a process of its own")
    alone = {name: COMPILED if name == BEST and compiled else name for name in names}
    if not amount.fresh:
        return rows
    figures = {name: [fresh.measure(setting, alone[name]) for _ in range(amount.fresh)] for name in names}
    for key, metric in fresh.METRICS[setting.device].items():
        rows += compare(case, metric, {name: [one[key] for one in each] for name, each in figures.items()})
    return rows


def refuse_unequal(rows: list[Row], tolerance: float) -> None:
    """Raise SystemExit where a ratio of `rows` is further from 1."""
    for row in rows:
        if abs(row.ratio - 1) > tolerance:
            raise SystemExit(
                f"{row.case}: not the same work: {row.metric}, ours {row.ours}, {row.peer_name} {row.peer}"
            )


class _Contenders:
    """All of them in this process, on one copy of the weights for us and one for the others."""

    def __init__(self, setting: Setting, amount: Amount, tell: Tell) -> None:
        rows = None if setting.mean is None else examples(setting)
        ours = Ours(setting, rows)
        start, model = ours.prefix, plain_model(setting)
        self.all: dict[str, Any] = {"ours": ours}
        for name, kind in PEERS.items():
            if kind is not PeftCompiled or amount.compiled:
                self.all[name] = kind(setting, model, ours.plan, start)
        if amount.compiled and setting.device == "cpu":
            compiled = Ours(replace(setting, compile="on"), rows)
            compiled.prepared.batches.order = ours.prepared.batches.order
            self.all[OURS_COMPILED] = compiled
        self.setting, self.tell, self.next_step = setting, tell, 0

    def agree(self, steps: int) -> dict[str, list[float]]:
        """The last loss of every contender after so many steps on the same batches; who cannot compile drops out."""
        self.next_step, found = steps, {}
        for name in list(self.all):
            try:
                found[name] = [self._last_loss(name, steps)]
            except Exception as error:  # the compiler raises many unrelated types
                if name != COMPILED:
                    raise
                self.tell(f"{COMPILED}: does not work here ({type(error).__name__})")
                del self.all[COMPILED]
        return found

    def _last_loss(self, name: str, steps: int) -> float:
        began = time.perf_counter()
        losses = [float(self.all[name].step(number).loss) for number in range(steps)]
        self.tell(f"{name}: {time.perf_counter() - began:.1f} s for its first {steps} steps")
        return losses[-1]

    def choose_best(self, steps: int) -> None:
        """Keep PEFT at its best as it is, or compiled, whichever is faster; then give every peer its own order."""
        for peer in self.all.values():
            if isinstance(peer, Peer):
                peer.plan = peer.own_plan(self.setting, peer.plan.examples)
        if COMPILED in self.all:
            rates = alternate({name: self.turn(name, steps) for name in (BEST, COMPILED)}, 2)
            gain = median(rates[COMPILED]) / median(rates[BEST])
            self.tell(f"{BEST}: torch.compile makes it {gain:.2f} times as fast")
            compiled = self.all.pop(COMPILED)
            if gain > 1:
                self.all[BEST] = compiled

    def turn(self, name: str, steps: int) -> Callable[[int], float]:
        """A turn: real tokens a second over steps that no earlier turn of this contender had."""
        begin = self.next_step

        def take(number: int) -> float:
            first = begin + number * steps
            self.next_step = max(self.next_step, first + steps)
            return rate(self.all[name], range(first, first + steps))

        return take


def rate(one: Any, numbers: range) -> float:
    """Real tokens a second of steps of a contender."""
    began = time.perf_counter()
    done = [one.step(number) for number in numbers]
    float(done[-1].loss)  # waits for the device
    return sum(step.tokens for step in done) / (time.perf_counter() - began)
