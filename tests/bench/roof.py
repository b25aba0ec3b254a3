"""What share of the device's arithmetic training in long packed rows reaches.

A frozen weight costs four floating-point operations a token: two forward, two for the gradient of what it read. Against
that stands the rate of a large matrix product in the same dtype, measured in turns with it. One row counts every weight
for every token; the other counts the output layer, which computes logits of targets alone, for these.
"""

from __future__ import annotations

import time

import torch

from tests.bench.contenders import Ours
from tests.bench.rounds import Row, alternate, compare
from tests.bench.shapes import Setting, examples
from tests.bench.speed import Amount, Tell

EVERY = "TFLOP/s, 4 a weight and token"
WORKING = "TFLOP/s, the output layer's at targets alone"
_SIDES = {"cuda": (8192, 50), "cpu": (512, 5)}
"""Of the matrices, and how often they are multiplied."""


def measure(case: str, setting: Setting, amount: Amount, tell: Tell) -> list[Row]:
    """Ours against the roof."""
    work = _Work(setting)
    took = work.warm(amount.equal)
    tell(f"{case}: {took:.1f} s for the first {amount.equal} steps")
    peer = f"{setting.dtype} matrix product"
    turns = {"ours": lambda number: work.turn(number, amount.steps), peer: lambda _: matmul_rate(setting)}
    found = alternate(turns, amount.rounds)
    others = {"ours": work.working, peer: found[peer]}
    return [*compare(case, EVERY, found), *compare(case, WORKING, others)]


class _Work:
    """Our training. A turn gives its rate with every weight counted, and leaves the other one in `working`."""

    def __init__(self, setting: Setting) -> None:
        self.ours, self.begin, self.working = Ours(setting, examples(setting)), 0, list[float]()
        model = self.ours.prepared.backbone.model
        self.weights = sum(weight.numel() for weight in model.parameters())
        self.output = model.get_output_embeddings().weight.numel()

    def warm(self, steps: int) -> float:
        """Seconds of the first steps, which compile."""
        began, self.begin = time.perf_counter(), steps
        for number in range(steps):
            self.ours.step(number)
        return time.perf_counter() - began

    def turn(self, number: int, steps: int) -> float:
        """Over steps that no earlier turn had."""
        numbers = range(self.begin + number * steps, self.begin + (number + 1) * steps)
        began = time.perf_counter()
        done = [self.ours.step(each) for each in numbers]
        float(done[-1].loss)  # waits for the device
        seconds, tokens = time.perf_counter() - began, sum(step.tokens for step in done)
        learnt = self.weights * tokens - self.output * (tokens - self._targets(numbers))
        self.working.append(4e-12 * learnt / seconds)
        return 4e-12 * self.weights * tokens / seconds

    def _targets(self, numbers: range) -> int:
        plan = self.ours.prepared.batches
        return sum(len(plan.examples[index].target) for number in numbers for index in plan.indices(number))


def matmul_rate(setting: Setting) -> float:
    """TFLOP/s of a product of two large square matrices."""
    side, times = _SIDES[setting.device]
    one, other = torch.randn(2, side, side, device=setting.device, dtype=setting.torch_dtype).unbind()
    float((one @ other)[0, 0])
    began = time.perf_counter()
    for _ in range(times):
        made = one @ other
    float(made[0, 0])  # waits for the device
    return 2e-12 * side**3 * times / (time.perf_counter() - began)
