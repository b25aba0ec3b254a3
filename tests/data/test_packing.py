"""Examples one after the other in a single row."""

from __future__ import annotations

import pytest

from prefixkit.data.batches import IGNORED, EncodedExample, collate
from prefixkit.data.packing import pack
from prefixkit.errors import DataError

EXAMPLES = [EncodedExample((1, 2), (3,)), EncodedExample((4,), (5, 6, 7)), EncodedExample((8, 9, 10), (11, 12))]


def test_a_row_holds_every_example_in_order_and_is_filled_up() -> None:
    row = pack(EXAMPLES, pad_id=99, bucket=8)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 99, 99, 99, 99]]
    assert row.segments.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, -1, -1, -1, -1]]
    assert row.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert row.attention_mask.tolist() == [[1] * 12 + [0] * 4]
    assert row.labels.tolist() == [[*[IGNORED] * 2, 3, IGNORED, 5, 6, 7, *[IGNORED] * 3, 11, 12, *[IGNORED] * 4]]


def test_it_counts_what_padded_rows_count() -> None:
    packed, padded = pack(EXAMPLES), collate(EXAMPLES)
    assert packed.input_ids.shape == (1, 128)
    for name in ("tokens", "target_tokens", "examples"):
        assert getattr(packed, name) == getattr(padded, name)


def test_a_full_row_is_not_filled_up() -> None:
    row = pack(EXAMPLES, bucket=6)
    assert row.input_ids.shape == (1, 12)
    assert row.examples == 3
    assert (row.segments >= 0).all()


def test_targets_stand_in_the_order_of_padded_rows() -> None:
    packed, padded = pack(EXAMPLES).labels, collate(EXAMPLES).labels
    assert packed[packed != IGNORED].tolist() == padded[padded != IGNORED].tolist()


def test_an_example_without_a_prompt_has_nothing_that_predicts_its_first_token() -> None:
    with pytest.raises(DataError, match="expected a prompt of a token or more; found an empty one"):
        pack([EXAMPLES[0], EncodedExample((), (1, 2))])
