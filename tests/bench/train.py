"""Training speed, side by side: ours, PEFT as people run it, PEFT at its best, a bare loop. From the project's root:

    python -m tests.bench.train [--cases NAME,…] [--rounds N] [--fresh N] [--json FILE] [--device cpu|cuda] [--quick]

All contenders run in one process, in turns, on batches that are collated then and never come back; collating, masks and
packing count. Before the first turn each takes some steps on the same batches from the same prefix, and their losses
must agree. Peak memory and the time to the first step come from a new process for each contender.

The backbone of a case is a shape with random weights unless `--backbone` gives a folder; `cpu-sweep8` trains the
embedded one. `--quick` tries the program: a few small steps of the embedded backbone on the CPU, also of the cases for
CUDA, nothing compiled, two prefixes in a sweep. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefixkit.quickstart import BACKBONE, E2E
from tests.bench import fit, roof, speed, sweep8, sweep16, wall
from tests.bench.rounds import Row, table
from tests.bench.shapes import GPT2_30M, GPT2_MEDIUM, LLAMA3_8B, QWEN3_600M, Setting, make_backbone
from tests.bench.speed import Amount, Tell

SWEEP = "cpu-sweep8"


@dataclass(frozen=True)
class Case:
    """What a name stands for.

    Attributes:
        shape: of the backbone; None takes the embedded one.
        mean: tokens of an example, on average; None trains on E2E.
        spread: of the logarithms of lengths.
        measure: gives its rows.
        stored: whether its weights come from a folder; else they are made where they are needed.
        recompute: whether ours compute their layers again, to save memory.
    """

    shape: Mapping[str, Any] | None
    batch_size: int
    device: str = "cuda"
    mean: int | None = 64
    length: int = 20
    dtype: str = "bfloat16"
    spread: float = 0.5
    measure: Callable[[str, Setting, Amount, Tell], list[Row]] = speed.measure
    stored: bool = True
    recompute: bool = False


CASES = {
    "h200-gpt2m-b64": Case(GPT2_MEDIUM, 64),
    "h200-qwen06-b64": Case(QWEN3_600M, 64),
    "h200-gpt2m-b10": Case(GPT2_MEDIUM, 10),
    "h200-qwen06-b10": Case(QWEN3_600M, 10),
    "h200-e2e-wall": Case(GPT2_MEDIUM, 64, mean=None, measure=wall.measure),
    "h200-qwen06-sweep16": Case(QWEN3_600M, 10, measure=sweep16.measure),
    "h200-qwen06-roof": Case(QWEN3_600M, 256, measure=roof.measure),
    "h200-8b-fit": Case(LLAMA3_8B, 16, mean=512, spread=0.0, measure=fit.measure, stored=False, recompute=True),
    "cpu-gpt2-30m-b16": Case(GPT2_30M, 16, "cpu", None, 16, "float32"),
    SWEEP: Case(None, 16, "cpu", None, 16, "float32"),
}


FULL = Amount(rounds=5, steps=16, equal=10, fresh=3)
QUICK = Amount(rounds=2, steps=3, equal=3, fresh=1, compiled=False, epochs=0.02, held_out=8, prefixes=2)


def measure(name: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """The rows of one case."""
    case, quick = CASES[name], options.quick
    setting = setting_of(case, options, folder)
    if name == SWEEP:
        return sweep8.measure(name, setting, rounds=2 if quick else options.rounds, quick=quick)
    amount = QUICK if quick else replace(FULL, rounds=options.rounds, steps=options.steps, fresh=options.fresh)
    return case.measure(name, setting, amount, tell)


def setting_of(case: Case, options: argparse.Namespace, folder: Path) -> Setting:
    """What `case` gives every contender; a backbone that is made for it goes to `folder`."""
    quick = options.quick
    if options.backbone is not None or quick or case.shape is None:
        backbone = str(options.backbone or BACKBONE)
    else:
        backbone = make_backbone(case.shape, folder, case.dtype, weights=case.stored)
    return Setting(
        backbone=backbone,
        data=str(E2E / "valid.jsonl" if quick else options.data),
        held_out=str(options.eval_data),
        batch_size=4 if quick else case.batch_size,
        mean=case.mean and min(case.mean, 32 if quick else case.mean),
        spread=case.spread,
        length=case.length,
        device="cpu" if quick else case.device,
        dtype="float32" if quick else case.dtype,
        # Ours are packed where they would be on CUDA, also when that is only tried.
        layout="packed" if case.device == "cuda" else "auto",
        compile=options.compile,
        recompute=case.recompute,
        threads=options.threads,
    )


def tell(message: str) -> None:
    """Progress, beside the table."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="of a turn")
    parser.add_argument("--fresh", type=int, default=3, help="processes for memory, a contender; 0 leaves it out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only the cases of this device")
    parser.add_argument("--backbone", type=Path, help="a folder, in the place of the cases' own")
    parser.add_argument("--data", type=Path, default=E2E / "train.jsonl.gz", help="E2E, for the cases that train on it")
    parser.add_argument("--eval-data", type=Path, default=E2E / "valid.jsonl", help="the same, for h200-e2e-wall")
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="ours, as `prefixkit train` has it"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.cases.split(",")) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if min(options.rounds, options.steps, options.threads) < 1:
        parser.error("--rounds, --steps and --threads: expected at least 1")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists; found no {options.json.parent}")
    wanted = [name for name in options.cases.split(",") if options.device in (None, CASES[name].device)]
    torch.set_num_threads(options.threads)
    here = [name for name in wanted if options.quick or CASES[name].device == "cpu" or torch.cuda.is_available()]
    rows: list[Row] = []
    for name in here:
        with tempfile.TemporaryDirectory() as folder:
            tell(f"{name} …")
            rows += measure(name, options, Path(folder))
        if options.json is not None:
            options.json.write_text(json.dumps([row.record() for row in rows], indent=1) + "\n")
    print(table(rows))
    if missing := [name for name in wanted if name not in here]:
        print(f"\nNot run, because there is no CUDA device here: {', '.join(missing)}.")


if __name__ == "__main__":
    main()
