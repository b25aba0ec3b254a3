"""Train a prefix, look at it, put it on the model, take it off again: the library in one page. Run it from anywhere."""

import sys
from pathlib import Path
from tempfile import mkdtemp

import prefixkit
from prefixkit.quickstart import BACKBONE, E2E


def main(steps: int = 40) -> None:
    output = Path(mkdtemp()) / "restaurants.safetensors"
    config = prefixkit.TrainConfig(
        backbone=str(BACKBONE), data=str(E2E / "train.jsonl.gz"), output=str(output), task="e2e", steps=steps
    )
    prefix = prefixkit.train(config)
    print(prefix.manifest.provenance.metrics, prefix.manifest.content)

    backbone = prefixkit.load_backbone(BACKBONE)
    model = prefixkit.attach(backbone.model, prefixkit.load(output))
    print(sum(parameter.requires_grad for parameter in model.parameters()), "trainable parameters")
    prefixkit.detach(model)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
