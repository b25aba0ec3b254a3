"""Visual prompts on the digits 5 to 9, on a ViT that has learned from 0 to 4: deep, shallow, added, and two baselines.

    python examples/pretrain_vit.py VIT
    python examples/visual_prompts.py VIT > visual_prompts.md

With a number of steps instead, everything is small: one seed, one rate, a ViT of one epoch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from comparison import FULL, Arm, Comparison, table
from pretrain_vit import digits

OTHERS = range(5, 10)
TRAINING, VALIDATION = 20, 20
"""Images of each class; the test set holds all others."""
LENGTH = 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PROMPTS = {"name": "visual-prompt-tuning", "length": LENGTH}
ONE = {**PROMPTS, "length": 1}
ARMS = (
    Arm("VPT deep", {**PROMPTS, "depth": "deep"}, RATES),
    Arm("VPT shallow", {**PROMPTS, "depth": "shallow"}, RATES),
    Arm("VPT deep, one prompt", {**ONE, "depth": "deep"}, RATES),
    Arm("VPT shallow, one prompt", {**ONE, "depth": "shallow"}, RATES),
    Arm("VPT deep, add", {**PROMPTS, "depth": "deep", "location": "add"}, RATES),
    Arm("VPT shallow, add", {**PROMPTS, "depth": "shallow", "location": "add"}, RATES),
    Arm("linear probe", {"name": "linear-probe"}, RATES),
    Arm(FULL, {"name": "linear-probe"}, tuple(rate / 10 for rate in RATES)),
)


def main(given: str = "") -> None:
    quick = given.isdigit()
    folder = mkdtemp()
    vit = f"{folder}/vit" if quick else given
    if quick:
        script = str(Path(__file__).with_name("pretrain_vit.py"))
        subprocess.run([sys.executable, script, vit, "--epochs", "1"], check=True, stdout=subprocess.DEVNULL)
    if not (Path(vit) / "config.json").is_file():
        sys.exit(f"{vit or 'VIT'}: expected a folder with a ViT; found none; next: python examples/pretrain_vit.py VIT")
    arms = [Arm(arm.name, arm.method, arm.rates[:1]) for arm in ARMS] if quick else ARMS
    comparison = Comparison(
        backbone=vit,
        task="images",
        data=lambda seed: split(folder, seed),
        metric="accuracy",
        steps=int(given) if quick else 300,
        batch_size=25,
        seeds=1 if quick else 5,
        searched=1 if quick else 5,
        head_rate=5e-3,
        folder=folder,
    )
    for row in table(comparison, arms):
        print(row, flush=True)


def split(folder: str, seed: int) -> tuple[str, str, str]:
    """Files of training, validation and test images; the seed draws the first two from the same half."""
    images, labels = digits(OTHERS)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen: dict[str, list[torch.Tensor]] = {"training": [], "validation": [], "test": []}
    generator = torch.Generator().manual_seed(seed)
    for label in range(len(OTHERS)):
        own = order[labels[order] == label]
        pool, test = own[:80], own[80:]
        drawn = pool[torch.randperm(len(pool), generator=generator)]
        chosen["training"].append(drawn[:TRAINING])
        chosen["validation"].append(drawn[TRAINING : TRAINING + VALIDATION])
        chosen["test"].append(test)
    paths = []
    for name, parts in chosen.items():
        rows = torch.cat(parts)
        paths.append(f"{folder}/{name}-{seed}.npz")
        np.savez(paths[-1], images=images[rows].numpy(), labels=labels[rows].numpy() + OTHERS.start)
    training, validation, test_file = paths
    return training, validation, test_file


if __name__ == "__main__":
    main(*sys.argv[1:])
