"""Pretrain a small ViT on the digits 0 to 4 of scikit-learn, for the comparison in visual_prompts.md.

It tells which digit, and by how many quarters it was turned (Gidaris et al. 2018, arXiv 1803.07728), on images that are
bent a little each time. Told the five digits alone it learns nothing else: a linear probe on its states then finds 54 %
of the digits 5 to 9, about as much as on those of a random ViT, and 89 % so.

    python examples/pretrain_vit.py OUT [--epochs 80]

OUT becomes a folder as the hub has them. Without arguments, or with a number of epochs, it goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

CLASSES = range(5)
SIDE, CHANNELS, BATCH = 8, 3, 64
TURNS = 4
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * CHANNELS,
    "image_std": [0.5] * CHANNELS,
}


def main() -> None:
    options = parse(sys.argv[1:])
    torch.manual_seed(0)
    images, labels = turned(*digits(CLASSES))
    held = torch.arange(len(images)) // TURNS % 5 == 0  # a digit and its turns stay together
    model = ViTForImageClassification(small_vit(TURNS * len(CLASSES)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {int((~held).sum())} images")
    fit(model, images[~held], labels[~held], options.epochs)
    print(f"accuracy on {int(held.sum())} held-out images: {accuracy(model, images[held], labels[held]):.3f}")
    model.save_pretrained(options.out)
    (Path(options.out) / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    print(f"written: {options.out}")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if not words or words[0].isdigit():
        words = [mkdtemp(), "--epochs", *(words or ["80"])]
    parser.add_argument("out")
    parser.add_argument("--epochs", type=int, default=80)
    return parser.parse_args(words)


def digits(classes: range) -> tuple[Tensor, Tensor]:
    """Images uint8 [images, 8, 8] and labels [images] of the digits in `classes`, counted from 0."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("the digits come with scikit-learn: pip install 'prefixkit[examples]'")
    read = load_digits()
    images = torch.from_numpy((read.images * (255 / 16)).round()).to(torch.uint8)
    labels = torch.from_numpy(read.target)
    wanted = (labels >= classes.start) & (labels < classes.stop)
    return images[wanted], labels[wanted] - classes.start


def turned(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each image by 0 to 3 quarters, one behind the other, with a label for each pair of a digit and a turn."""
    every = torch.stack([images.rot90(quarters, (1, 2)) for quarters in range(TURNS)], dim=1)
    return every.flatten(0, 1), (labels[:, None] * TURNS + torch.arange(TURNS)).flatten()


def small_vit(labels: int) -> ViTConfig:
    return ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=SIDE,
        patch_size=2,
        num_channels=CHANNELS,
        num_labels=labels,
    )


def pixels(images: Tensor) -> Tensor:
    """What PROCESSOR makes of grey images: [images, 3, 8, 8] between -1 and 1."""
    return ((images.float() / 255 - 0.5) / 0.5)[:, None].expand(-1, CHANNELS, -1, -1)


def fit(model: ViTForImageClassification, images: Tensor, labels: Tensor, epochs: int) -> None:
    """AdamW with a one-cycle rate, on images that are bent anew each time."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(2, epochs * batches), pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            logits = model(pixel_values=pixels(bent(images[chosen]))).logits
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


def bent(images: Tensor) -> Tensor:
    """Each image turned by up to 20 degrees, scaled, moved and slanted a little; float, as bright as before."""
    angle, scale, slant, right, down = torch.rand(5, len(images)) - 0.5
    angle, scale = 0.7 * angle, 1 + 0.3 * scale
    first = torch.stack([scale * angle.cos(), 0.6 * slant - scale * angle.sin(), 0.4 * right], dim=1)
    second = torch.stack([scale * angle.sin(), scale * angle.cos(), 0.4 * down], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    chosen = model(pixel_values=pixels(images)).logits.argmax(dim=1)
    return (chosen == labels).float().mean().item()


if __name__ == "__main__":
    main()
