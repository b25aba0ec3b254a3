"""One contender in a process of its own: its peak memory, and how long it takes to its first step.

Memory on a CPU is the growth of the resident set above what it is once the weights are loaded, read in every page and
all is built: `VmHWM` of Linux after it is set back, so that no peak of loading counts and no allocator is wrapped. It
is read once with all that a first step loads and compiles, and once above that: activations and gradients. On CUDA it
is `max_memory_allocated`, weights and all. The steps are those of an epoch's largest batches, after one of the smallest
that is timed. The time to the first step counts from the end of the imports: reading the data and the weights,
building, compiling, one step.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from prefixkit.training import layout
from tests.bench.contenders import OURS_COMPILED, PEERS, Ours, Peer, plain_model
from tests.bench.shapes import Setting, examples

STEPS = 4
"""The largest batches of an epoch that are tried."""
METRICS = {
    "cpu": {
        "peak": "peak memory above the weights, MiB",
        "later": "the same, above what stays after a first step, MiB",
        "first": "seconds to the first step",
    },
    "cuda": {"peak": "peak memory, MiB", "first": "seconds to the first step"},
}


def measure(setting: Setting, contender: str) -> dict[str, float]:
    """What `METRICS` names, of `contender` in a new process.

    Raises:
        RuntimeError: the process failed; its last line of complaint.
    """
    command = [sys.executable, "-m", "tests.bench.fresh", contender, json.dumps(asdict(setting))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def build(setting: Setting, contender: str) -> Ours | Peer:
    """`contender` with the data as it would read them itself."""
    if contender in ("ours", OURS_COMPILED):
        setting = replace(setting, compile="on") if contender == OURS_COMPILED else setting
        return Ours(setting, None if setting.mean is None else examples(setting))
    rows, kind = examples(setting), PEERS[contender]
    return kind(setting, plain_model(setting), kind.own_plan(setting, rows), None)


def largest(built: Ours | Peer) -> list[int]:
    """Steps of the first epoch of what `built` reads: the one with the smallest batch, then those with the largest."""
    plan: Any = built.plan
    packed = isinstance(built, Ours) and layout.packs(built.prepared.batches.collate)
    lengths = [len(example) for example in plan.examples]
    sizes = [[lengths[i] for i in plan.indices(step)] for step in range(len(lengths) // plan.batch_size)]
    tokens = [sum(each) if packed else max(each) * len(each) for each in sizes]
    steps = sorted(range(len(sizes)), key=tokens.__getitem__)
    return [steps[0], *steps[-STEPS:]]


class _Resident:
    """Growth of the resident set, in MiB."""

    def __init__(self, built: Any) -> None:
        # Weights may be a file that is mapped: what nobody read yet is not resident, and would count as growth.
        for weight in (built.prepared.backbone.model if isinstance(built, Ours) else built.model).parameters():
            weight.sum()
        self.before, self.after_first, self.peak = _forget_peak(), 0.0, 0.0

    def first_step_is_done(self) -> None:
        """From here on nothing is compiled or loaded."""
        self.peak = of_process("VmHWM")
        self.after_first = _forget_peak()

    def figures(self) -> dict[str, float]:
        """The peaks, above the weights and above what stays after a step."""
        peak = of_process("VmHWM")
        return {"peak": max(peak, self.peak) - self.before, "later": peak - self.after_first}


def of_process(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def _forget_peak() -> float:
    """Set the peak back to what is resident now, and give that in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return of_process("VmRSS")


class _Allocated:
    """What tensors on the GPU take, in MiB."""

    def first_step_is_done(self) -> None:
        """Nothing: only tensors count there."""

    def figures(self) -> dict[str, float]:
        """The peak, weights and all."""
        return {"peak": torch.cuda.max_memory_allocated() / 2**20}


def main(contender: str, described: str) -> None:
    setting = Setting(**json.loads(described))
    torch.set_num_threads(setting.threads)
    began = time.perf_counter()
    built = build(setting, contender)
    spent, (small, *large) = time.perf_counter() - began, largest(built)
    memory = _Resident(built) if setting.device == "cpu" else _Allocated()
    began = time.perf_counter()
    float(built.step(small).loss)
    spent += time.perf_counter() - began
    memory.first_step_is_done()
    for step in large:
        float(built.step(step).loss)
    print(json.dumps({"first": spent, **memory.figures()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
