"""The mask that counts tokens: what each query sees, wherever padding lies."""

from __future__ import annotations

import pytest
import torch

from prefixkit.backbones.masks import causal_mask


def visible(mask: list[int], seq: int, window: int | None = None) -> list[list[int]]:
    """The slots that each query of one row sees."""
    additive = causal_mask(torch.tensor([mask]), seq, torch.float32, window)[0, 0]
    assert set(additive.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    return [row.nonzero().flatten().tolist() for row in additive == 0]


def test_without_padding_it_is_the_triangle() -> None:
    assert visible([1, 1, 1], 3) == [[0], [0, 1], [0, 1, 2]]


def test_padding_between_prefix_and_text_is_not_seen() -> None:
    assert visible([1, 1, 0, 0, 1, 1], 4)[2:] == [[0, 1, 4], [0, 1, 4, 5]]


def test_a_window_counts_tokens_and_not_slots() -> None:
    padded = visible([1, 1, 0, 0, 0, 1, 1], 2, window=3)
    dense = visible([1, 1, 1, 1], 2, window=3)
    assert padded == [[0, 1, 5], [1, 5, 6]]
    assert [len(row) for row in padded] == [len(row) for row in dense]


def test_a_query_of_padding_sees_itself_so_that_no_row_is_empty() -> None:
    assert visible([0, 0, 1], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_has_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    mask = causal_mask(torch.ones(2, 5, dtype=torch.long), 3, dtype)
    assert (mask.dtype, mask.shape, bool(mask.isfinite().all())) == (dtype, (2, 1, 3, 5), True)
