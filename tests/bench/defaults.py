"""The experiment behind the defaults: validation loss by learning rate, start, reparametrisation and length.

    python -m tests.bench.defaults --steps 300 --out defaults.jsonl

Runs on the embedded backbone and sample, or on `--backbone`, `--data` and `--eval-data`. Each row is one run of the
product's own loop; a row that exists in `--out` is not run again. `--table` prints what `--out` holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.training import loop
from prefixkit.training.config import from_mapping

CASES: list[dict[str, Any]] = [
    *({"lr": lr} for lr in (0.1, 0.03, 0.2)),
    *({"lr": 0.1, "init": init} for init in ("random", "text:Describe the restaurant in one sentence :", "zeros")),
    *({"lr": lr, "reparameterization": "mlp"} for lr in (2e-3, 1e-3)),
    *({"lr": 0.1, "length": length} for length in (4, 64)),
    *({"name": "prompt-tuning", "lr": lr} for lr in (0.3, 0.1, 1.0)),
    *({"name": "prompt-tuning", "unit": "one", "lr": lr} for lr in (0.1, 0.3, 1.0)),
    *({"name": "p-tuning", "lr": lr} for lr in (3e-3, 1e-3, 1e-2)),
]


def validation_loss(options: argparse.Namespace, case: dict[str, Any], seed: int) -> float:
    """The best validation loss of one run."""
    method = {key: value for key, value in case.items() if key != "lr"}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "backbone": str(options.backbone),
            "data": str(options.data),
            "eval_data": str(options.eval_data),
            "output": f"{folder}/prefix",
            "task": "e2e",
            "steps": options.steps,
            "seed": seed,
            "method": method,
            "optimizer": {"lr": case["lr"]},
        }
        return loop.train(from_mapping(settings)).manifest.provenance.metrics["validation_loss"]


def table(path: Path) -> str:
    """The rows of `path` as a table in Markdown: mean and spread over seeds."""
    cases: dict[str, list[float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        cases.setdefault(", ".join(f"{key} {value}" for key, value in row["case"].items()), []).append(row["loss"])
    lines = ["| case (else the defaults) | validation loss | seeds | spread |", "|---|---:|---:|---:|"]
    for case, losses in cases.items():
        spread = max(losses) - min(losses)
        lines.append(f"| {case} | {sum(losses) / len(losses):.4f} | {len(losses)} | {spread:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, default=BACKBONE)
    parser.add_argument("--data", type=Path, default=E2E / "train.jsonl.gz")
    parser.add_argument("--eval-data", type=Path, default=E2E / "valid.jsonl")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = options.out.read_text().splitlines() if options.out.exists() else []
    known = [(row["case"], row["seed"]) for row in map(json.loads, done)]
    cases = [] if options.table else [(case, seed) for seed in options.seeds for case in CASES]
    todo = [one for one in cases if one not in known]
    for case, seed in todo:
        began = time.process_time()
        row = {"case": case, "seed": seed, "steps": options.steps, "loss": validation_loss(options, case, seed)}
        with options.out.open("a") as file:
            file.write(json.dumps({**row, "processor_seconds": round(time.process_time() - began)}) + "\n")
    print(table(options.out))


if __name__ == "__main__":
    main()
