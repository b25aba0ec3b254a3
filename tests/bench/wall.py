"""Epochs of E2E on the wall clock: when each contender reaches the validation loss with which plain PEFT ends.

All begin with the same prefix. Each trains in a process of its own, with an empty place for what torch compiles. The
clock starts behind the imports: reading data and weights, building and compiling count. It stands still during
validation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefixkit.data.batches import EncodedExample, collate, in_order
from prefixkit.training.validation import mean_loss
from tests.bench.contenders import Ours, Peer
from tests.bench.fresh import build
from tests.bench.rounds import Row, compare
from tests.bench.shapes import Setting, examples
from tests.bench.speed import BEST, COMPILED, Amount, Tell

POINTS = 40
"""Validations of a run, evenly through it."""
Curve = list[tuple[float, float]]
"""Seconds since the beginning, and the validation loss then, in nats a target token."""


def measure(case: str, setting: Setting, amount: Amount, tell: Tell) -> list[Row]:
    """Ours against PEFT as people run it, and at its best, compiled or not, whichever comes first; once.

    Raises:
        SystemExit: ours never reaches that loss.
    """
    curves = _curves(case, setting, amount, tell)
    wanted = curves["PEFT"][-1][1]
    times = {name: _reached(curve, wanted) for name, curve in curves.items()}
    if times["ours"] is None:
        raise SystemExit(f"{case}: ours ends at {curves['ours'][-1][1]:.4f}, PEFT at {wanted:.4f}")
    # Who never gets there took at least its whole run.
    spent = {name: curves[name][-1][0] if when is None else when for name, when in times.items()}
    if COMPILED in spent and spent[COMPILED] < spent[BEST]:
        spent[BEST], curves[BEST] = spent[COMPILED], curves[COMPILED]
    named = ("ours", "PEFT", BEST)
    rows = compare(case, f"seconds to a validation loss of {wanted:.4f}", {name: [spent[name]] for name in named})
    return rows + compare(case, "validation loss at the end", {name: [curves[name][-1][1]] for name in named})


def _curves(case: str, setting: Setting, amount: Amount, tell: Tell) -> dict[str, Curve]:
    """Of every contender, from the same prefix; who cannot compile drops out."""
    steps = max(1, round(amount.epochs * len(examples(setting)) / setting.batch_size))
    found: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.pt"
        # The prefix alone is wanted of it: compiling takes minutes.
        torch.save(Ours(replace(setting, compile="off"), None).prefix.cpu(), start)
        for name in ("ours", "PEFT", BEST, *([COMPILED] if amount.compiled else [])):
            try:
                found[name] = in_a_process(setting, name, steps, amount.held_out, start)
            except RuntimeError as error:
                if name != COMPILED:
                    raise
                tell(f"{case}: {error}")
                continue
            seconds, loss = found[name][-1]
            tell(f"{case}: {name}: {steps} steps in {seconds:.0f} s, validation loss {loss:.4f}")
    return found


def _reached(curve: Curve, wanted: float) -> float | None:
    return next((seconds for seconds, loss in curve if loss <= wanted), None)


def in_a_process(setting: Setting, contender: str, steps: int, limit: int, start: Path) -> Curve:
    """`curve` in a new process.

    Raises:
        RuntimeError: it failed; its last line of complaint.
    """
    given = [contender, str(steps), str(limit), str(start), json.dumps(asdict(setting))]
    command = [sys.executable, "-m", "tests.bench.wall", *given]
    with tempfile.TemporaryDirectory() as empty:
        places = {"TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor", "TRITON_CACHE_DIR": f"{empty}/triton"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **places})
    if done.returncode:
        raise RuntimeError(f"{contender}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [(seconds, loss) for seconds, loss in json.loads(done.stdout.splitlines()[-1])]


def curve(setting: Setting, contender: str, steps: int, limit: int, start: Path) -> Curve:
    """How the loss of `contender` on at most `limit` validation examples falls over `steps` from the prefix `start`."""
    began = time.perf_counter()
    built = build(setting, contender)
    trained(built).data.copy_(torch.load(start))
    spent, found = time.perf_counter() - began, list[tuple[float, float]]()
    known = examples(replace(setting, data=setting.held_out))
    held_out = known[:: -(-len(known) // limit)]
    for part in np.array_split(np.arange(steps), min(POINTS, steps)):
        began = time.perf_counter()
        done = [built.step(int(number)) for number in part]
        float(done[-1].loss)  # waits for the device
        spent += time.perf_counter() - began
        found.append((spent, validation_loss(built, held_out, setting.batch_size)))
    return found


def trained(built: Ours | Peer) -> torch.Tensor:
    """The parameter that a contender trains: [prefix, width] of every one."""
    if isinstance(built, Peer):
        return built.trained
    (only,) = built.prepared.method.parameters()
    return only


@torch.no_grad()
def validation_loss(built: Ours | Peer, rows: Sequence[EncodedExample], batch_size: int) -> float:
    """In nats a target token, as each contender computes its loss."""
    if isinstance(built, Ours):
        prepared = built.prepared
        received = prepared.backbone.fold(prepared.method.fold())
        making = (batch_size, prepared.objective, prepared.batches.collate)
        return mean_loss(prepared.backbone, list(rows), received, *making)
    total, tokens = 0.0, 0
    for batch in in_order(rows, batch_size=batch_size, collate=collate):
        given: Any = batch.to(built.device)
        total += float(built.loss(given.input_ids, given.attention_mask, given.labels)) * batch.target_tokens
        tokens += batch.target_tokens
    return total / tokens


def main(contender: str, steps: str, limit: str, start: str, described: str) -> None:
    setting = Setting(**json.loads(described))
    torch.set_num_threads(setting.threads)
    print(json.dumps(curve(setting, contender, int(steps), int(limit), Path(start))))


if __name__ == "__main__":
    main(*sys.argv[1:])
