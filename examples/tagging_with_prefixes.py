"""Tagging the entities of WNUT-17 with a small frozen encoder: P-Tuning v2 against prompt tuning, and two baselines.

    python examples/pretrain_encoder.py TEXT DECODER ENCODER
    python examples/tagging_with_prefixes.py ENCODER WNUT17 > tagging_with_prefixes.md

WNUT17 is the folder of the shared task's files (github.com/leondz/emerging_entities_17). Training takes the sentences
that hold an entity, 1,228 of 3,394: in minutes a head learns little more from the others than to say O. With a number
of steps instead, everything is small: one seed, one rate, an encoder of two steps and three sentences.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import mkdtemp

from comparison import FULL, Arm, Comparison, table

from prefixkit.quickstart import BACKBONE

FILES = {"training": "wnut17train.conll", "validation": "emerging.dev.conll", "test": "emerging.test.annotated"}
SENTENCES = "In\tO\nParis\tB-location\n\t\nBlue\tB-group\nSpice\tI-group\nopens\tO\n\t\nHello\tO\nJane\tB-person\n"
LENGTH = 16
KEYS_AND_VALUES = {"name": "p-tuning-v2", "length": LENGTH}
ARMS = (
    Arm("P-Tuning v2", KEYS_AND_VALUES, (3e-3, 1e-2, 3e-2, 1e-1)),
    Arm("prompt tuning", {"name": "prompt-tuning", "length": LENGTH}, (3e-1, 1.0, 3.0, 10.0)),
    Arm("linear probe", {"name": "linear-probe"}, (1e-2, 3e-2, 1e-1, 3e-1)),
    Arm("P-Tuning v2, MLP", {**KEYS_AND_VALUES, "reparameterization": "mlp"}, (3e-4, 1e-3, 3e-3, 1e-2)),
    Arm(FULL, {"name": "linear-probe"}, (1e-4, 3e-4, 1e-3, 3e-3)),
)


def main(given: str = "", source: str = "") -> None:
    quick, folder = given.isdigit(), mkdtemp()
    encoder = f"{folder}/encoder" if quick else given
    if quick:
        source = written_sentences(folder)
        script = Path(__file__).with_name("pretrain_encoder.py")
        words = [sys.executable, script, __file__, BACKBONE, encoder, "--steps", "2"]
        subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    for path in (Path(encoder, "config.json"), *(Path(source, file) for file in FILES.values())):
        if not path.is_file():
            sys.exit(f"{path}: expected a file; found none; next: name both folders, as {__file__} begins with")
    files = {
        name: converted(Path(source, file), Path(folder, f"{name}.jsonl"), tagged_only=name == "training")
        for name, file in FILES.items()
    }
    arms = [Arm(arm.name, arm.method, arm.rates[:1]) for arm in ARMS] if quick else ARMS
    comparison = Comparison(
        backbone=encoder,
        task="tagging",
        data=lambda seed: (files["training"], files["validation"], files["test"]),
        metric="f1",
        steps=int(given) if quick else 400,
        batch_size=8,
        seeds=1 if quick else 5,
        searched=1,
        head_rate=3e-2,  # the best of the linear probe
        folder=folder,
    )
    for row in table(comparison, arms):
        print(row, flush=True)


def converted(conll: Path, jsonl: Path, *, tagged_only: bool) -> str:
    """The sentences of a CoNLL file as prefixkit reads them: `{"tokens": [...], "tags": [...]}` a line."""
    with conll.open(encoding="utf-8") as lines, jsonl.open("w", encoding="utf-8") as written:
        for sentence in sentences(lines):
            tokens, tags = zip(*sentence, strict=True)
            if tagged_only and set(tags) == {"O"}:
                continue
            written.write(json.dumps({"tokens": tokens, "tags": tags}) + "\n")
    return str(jsonl)


def sentences(lines: Iterable[str]) -> Iterator[list[tuple[str, str]]]:
    """(word, tag) by sentence; lines without a word stand between them, and some of those hold a tab."""
    sentence: list[tuple[str, str]] = []
    for line in lines:
        word, _, tag = line.strip().partition("\t")
        if word:
            sentence.append((word, tag))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def written_sentences(folder: str) -> str:
    for name in FILES.values():
        Path(folder, name).write_text(SENTENCES, encoding="utf-8")
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
