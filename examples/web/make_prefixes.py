"""Train the prefixes of the page on the embedded backbone: `python -m examples.web.make_prefixes [VOICE …]`.

Some minutes each on one core; the same seed gives the same files. In every second example the restaurant gets a
made-up name: E2E has 34, and a prefix that has seen no other would not learn to take a name from its input.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from examples.web.voices import VOICES, Voice, parse
from prefixkit.prefix import load
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.training.config import from_mapping
from prefixkit.training.loop import train

PREFIXES = Path(__file__).parent / "prefixes"
BATCH, LR, SEED = 8, 0.12, 0
# fmt: off
_FIRST = (
    "Golden", "Silver", "Old", "Little", "Red", "Blue", "Green", "Copper", "Quiet", "Hungry", "Happy", "Lucky",
    "Iron", "Velvet", "Crooked",
)
_SECOND = (
    "Lantern", "Kettle", "Anchor", "Fox", "Heron", "Spoon", "Table", "Oven", "Bridge", "Garden", "Barrel",
    "Orchard", "Goose", "Mill", "Corner",
)
# fmt: on
_NAMES = [f"{the}{first} {second}" for the, first, second in product(("The ", ""), _FIRST, _SECOND)]
_NEVER = ("The Quiet Heron", "Copper Kettle")
"""Kept for tests and for the page."""


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """`(attributes, sentence)` of a file of the embedded sample, the first sentence where there are several."""
    data = path.read_bytes()
    for line in (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines():
        example = json.loads(line)
        target = example["target"]
        yield example["input"], target if isinstance(target, str) else target[0]


def renamed(pairs: Iterator[tuple[str, str]], draw: random.Random) -> Iterator[tuple[str, str]]:
    """`pairs`, every second one with a name that is nobody's, where the sentence spells the name as the input does."""
    names = [name for name in _NAMES if name not in _NEVER]
    for attributes, sentence in pairs:
        name = attributes.split(" | ")[0].removeprefix("name : ")
        if name not in sentence or draw.random() < 0.5:
            yield attributes, sentence
        else:
            other = draw.choice(names)
            yield attributes.replace(name, other), sentence.replace(name, other)


def write_examples(voice: Voice, source: Path, path: Path) -> None:
    """The examples of `voice` from an E2E file, as JSONL."""
    with path.open("w", encoding="utf-8") as output:
        for attributes, sentence in renamed(lines(source), random.Random(SEED)):
            if voice.wants(parse(attributes), sentence):
                given, target = voice.example(attributes, sentence)
                output.write(json.dumps({"input": given, "target": target}, ensure_ascii=False) + "\n")


def make(voice: Voice, folder: Path) -> None:
    """Train the prefix of `voice`, with `folder` for its data and task."""
    write_examples(voice, E2E / "train.jsonl.gz", folder / "train.jsonl")
    write_examples(voice, E2E / "valid.jsonl", folder / "valid.jsonl")
    task = [f'name = "{voice.title}"', 'input_template = " {input} "', 'separator = "{eos}"']
    (folder / f"{voice.file}.toml").write_text("\n".join([*task, 'target_template = " {target} "']) + "\n")
    settings = {
        "backbone": str(BACKBONE),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "valid.jsonl"),
        "output": str(PREFIXES / f"{voice.file}.safetensors"),
        "task": str(folder / f"{voice.file}.toml"),
        "steps": voice.steps,
        "batch_size": BATCH,
        "seed": SEED,
        "optimizer": {"lr": LR},
        "evaluation": {"every": voice.steps // 4, "limit": 60},
    }
    train(from_mapping(settings))
    print(voice.file, dict(load(settings["output"]).manifest.provenance.metrics), flush=True)


def main() -> None:
    """Train the voices that are named, or all."""
    PREFIXES.mkdir(exist_ok=True)
    for voice in VOICES:
        if voice.file in (sys.argv[1:] or [one.file for one in VOICES]):
            with tempfile.TemporaryDirectory() as folder:
                make(voice, Path(folder))


if __name__ == "__main__":
    main()
