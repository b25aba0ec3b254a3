"""Draws the E2E sample that `prefixkit quickstart` trains on.

    python -m tests.bench.draw_e2e_sample E2E_FOLDER

E2E_FOLDER holds train.txt.gz, valid.txt.gz and test.txt.gz, the E2E data in the line format of Prefix-Tuning. The
same files give the same bytes. Train has every distinct input once, then random further lines up to TRAIN_LINES,
and no input of valid or test; valid and test have random inputs with all their references.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prefixkit.data.readers import Example, read_examples
from prefixkit.data.references import ReferenceGroup, group_references

SEED = 2017
TRAIN_LINES = 12_000
VALID_INPUTS = 60
TEST_INPUTS = 100
TARGET = Path(__file__).parents[2] / "prefixkit" / "quickstart" / "e2e"


def draw_train(examples: Sequence[Example], held_out: set[Any]) -> list[Example]:
    """One line of every input, further lines at random; sorted by input, which compresses best."""
    shuffled = [example for example in examples if example.fields["input"] not in held_out]
    random.Random(SEED).shuffle(shuffled)
    first: dict[Any, Example] = {}
    for example in shuffled:
        first.setdefault(example.fields["input"], example)
    covering = list(first.values())
    chosen = {id(example) for example in covering}
    others = [example for example in shuffled if id(example) not in chosen]
    return sorted(covering + others[: TRAIN_LINES - len(covering)], key=lambda e: (e.fields["input"], e.target))


def draw_groups(groups: Sequence[ReferenceGroup], count: int) -> list[ReferenceGroup]:
    """`count` inputs at random, in the order of the data."""
    kept = sorted(random.Random(SEED).sample(range(len(groups)), count))
    return [groups[i] for i in kept]


def lines(records: Iterable[tuple[Any, Any]]) -> bytes:
    """JSON Lines of (input, target) pairs."""
    rows = ({"input": source, "target": target} for source, target in records)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main(folder: Path) -> None:
    train = read_examples(folder / "train.txt.gz")
    valid = group_references(read_examples(folder / "valid.txt.gz"))
    test = group_references(read_examples(folder / "test.txt.gz"))
    held_out = {group.fields["input"] for group in valid + test}
    TARGET.mkdir(parents=True, exist_ok=True)
    drawn = lines((example.fields["input"], example.target) for example in draw_train(train, held_out))
    # No name and no time in the gzip header, so that the same data gives the same bytes.
    (TARGET / "train.jsonl.gz").write_bytes(gzip.compress(drawn, mtime=0))
    for name, groups, count in (("valid", valid, VALID_INPUTS), ("test", test, TEST_INPUTS)):
        kept = draw_groups(groups, count)
        (TARGET / f"{name}.jsonl").write_bytes(lines((group.fields["input"], list(group.references)) for group in kept))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
