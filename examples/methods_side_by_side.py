"""Methods that learn from examples, side by side: one frozen model, one loop, equal steps. Run it from anywhere."""

import sys
from pathlib import Path
from tempfile import mkdtemp

from prefixkit import TrainConfig, train
from prefixkit.methods.catalogue import METHODS
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.training.config import EvaluationConfig, method_settings

NAMES = ("prefix-tuning", "prompt-tuning", "p-tuning", "autoprompt")


def main(steps: int = 100) -> None:
    folder = Path(mkdtemp())
    for name in NAMES:
        config = TrainConfig(
            backbone=str(BACKBONE),
            data=str(E2E / "train.jsonl.gz"),
            eval_data=str(E2E / "valid.jsonl"),
            output=str(folder / f"{name}.safetensors"),
            task="e2e",
            steps=steps,
            method=method_settings({"name": name, "length": 8}),
            evaluation=EvaluationConfig(every=steps, limit=64),
        )
        metrics = train(config).manifest.provenance.metrics
        size = (folder / f"{name}.safetensors").stat().st_size
        print(f"{metrics['validation_loss']:.3f} nats a token, {size:,} bytes: {METHODS[name].trains}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
