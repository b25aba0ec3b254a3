from __future__ import annotations

from pathlib import Path

import prefixkit.data
from prefixkit.data.readers import read_examples
from prefixkit.data.references import group_references

SAMPLE = Path(prefixkit.data.__file__).parents[1] / "quickstart" / "e2e"


def test_sample_is_what_its_card_says() -> None:
    train = read_examples(SAMPLE / "train.jsonl.gz")
    valid, test = (read_examples(SAMPLE / f"{name}.jsonl") for name in ("valid", "test"))
    assert [len(examples) for examples in (train, valid, test)] == [12_000, 523, 806]
    inputs = [[group.fields["input"] for group in group_references(examples)] for examples in (train, valid, test)]
    assert [len(distinct) for distinct in inputs] == [4_862, 60, 100]
    assert len({source for distinct in inputs for source in distinct}) == 4_862 + 60 + 100
    assert all(example.target.endswith(" ") for example in train)


def test_sample_is_small() -> None:
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) < 1_000_000
