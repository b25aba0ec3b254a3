"""Methods that learn from examples, side by side: one frozen model, one loop, equal steps, and a plot of their losses.

Run it from anywhere: `python methods_side_by_side.py [STEPS [VALIDATION EXAMPLES]]`; pip install 'prefixkit[examples]'.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import matplotlib
from matplotlib import pyplot

from prefixkit import TrainConfig, train
from prefixkit.methods.catalogue import METHODS
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.training.config import EvaluationConfig, method_settings
from prefixkit.training.progress import Silence, Validation

NAMES = ("prefix-tuning", "prompt-tuning", "p-tuning", "autoprompt")
VALIDATIONS = 10


class Curve(Silence):
    """What a run's validations found."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def on_validation(self, validation: Validation) -> None:
        self.steps.append(validation.step)
        self.losses.append(validation.loss)


def main(steps: int = 100, limit: int = 64) -> None:
    folder, curves = Path(mkdtemp()), {}
    for name in NAMES:
        config = TrainConfig(
            backbone=str(BACKBONE),
            data=str(E2E / "train.jsonl.gz"),
            eval_data=str(E2E / "valid.jsonl"),
            output=str(folder / f"{name}.safetensors"),
            task="e2e",
            steps=steps,
            method=method_settings({"name": name, "length": 8}),
            evaluation=EvaluationConfig(every=max(1, steps // VALIDATIONS), limit=limit),
        )
        curves[name] = Curve()
        metrics = train(config, listener=curves[name]).manifest.provenance.metrics
        size = (folder / f"{name}.safetensors").stat().st_size
        print(f"{metrics['validation_loss']:.3f} nats a token, {size:,} bytes: {METHODS[name].trains}")
    draw(curves, Path("methods_side_by_side.svg"))


def draw(curves: dict[str, Curve], path: Path) -> None:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prefixkit"  # the same runs, the same bytes
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve.steps, curve.losses, marker="o", markersize=3, label=name)
    axes.set(xlabel="steps", ylabel="validation loss, nats a token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
