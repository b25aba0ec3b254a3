from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from prefixkit.data.batches import (
    IGNORED,
    NEAR,
    Batch,
    EncodedExample,
    Order,
    TrainingBatches,
    collate,
    collate_pairs,
    count_truncated,
    encode_examples,
    in_order,
)
from prefixkit.data.readers import Example
from prefixkit.errors import ConfigError, DataError
from prefixkit.task import encode_prompt, encode_target, load_task
from tests.small_tokenizer import small_tokenizer


def ragged(count: int) -> list[EncodedExample]:
    """Examples of 2 to 60 tokens; the first token of each is its number."""
    draw = random.Random(0)
    return [EncodedExample((i, *[7] * draw.randrange(40)), (8,) * draw.randrange(1, 20)) for i in range(count)]


def numbers(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in vars(left))


def test_examples_are_encoded_as_the_task_says() -> None:
    tokenizer = small_tokenizer()
    task = load_task("e2e", tokenizer, max_length=40)
    (encoded,) = encode_examples(task, tokenizer, [Example({"input": "name : Blue"}, "Blue . ")])
    assert list(encoded.prompt) == encode_prompt(task, tokenizer, {"input": "name : Blue"})
    assert list(encoded.target) == encode_target(task, tokenizer, "Blue . ")


def test_long_input_is_cut_and_long_target_refused() -> None:
    tokenizer = small_tokenizer()
    task = load_task("e2e", tokenizer, max_length=40)
    (encoded,) = encode_examples(task, tokenizer, [Example({"input": "word " * 99}, "Blue . ")])
    assert len(encoded) == 40
    assert encoded.prompt[-1] == tokenizer.eos_id
    whole = encode_prompt(replace(task, max_length=999), tokenizer, {"input": "word " * 99})
    assert encoded.truncated == len(whole) - len(encoded.prompt) > 0
    with pytest.raises(DataError, match=r"d\.jsonl:5: expected at most 40 tokens"):
        encode_examples(task, tokenizer, [Example({"input": "a"}, "word " * 99, "d.jsonl:5")])


def test_examples_that_lost_input_are_counted() -> None:
    tokenizer = small_tokenizer()
    task = load_task("e2e", tokenizer, max_length=40)
    examples = [Example({"input": text}, "Blue . ") for text in ("word " * 99, "short", "word " * 50)]
    encoded = encode_examples(task, tokenizer, examples)
    assert [example.truncated > 0 for example in encoded] == [True, False, True]
    assert count_truncated(encoded) == 2


@pytest.mark.parametrize(
    ("side", "ids", "mask", "labels"),
    [
        ("right", [1, 2, 3, 9], [1, 1, 1, 0], [IGNORED, 2, 3, IGNORED]),
        ("left", [9, 1, 2, 3], [0, 1, 1, 1], [IGNORED, IGNORED, 2, 3]),
    ],
)
def test_padding(side: str, ids: list[int], mask: list[int], labels: list[int]) -> None:
    batch = collate([EncodedExample((1,), (2, 3)), EncodedExample((4, 5, 6), (7,))], pad_id=9, side=side)
    assert batch.input_ids.tolist() == [ids, [4, 5, 6, 7]]
    assert batch.attention_mask.tolist() == [mask, [1, 1, 1, 1]]
    assert batch.labels.tolist() == [labels, [IGNORED] * 3 + [7]]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    assert (batch.tokens, batch.target_tokens) == (7, 3)


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("count", [1, 7, 8, 1000, 1003])
def test_every_example_once_an_epoch(count: int, order: Order) -> None:
    batches = TrainingBatches(ragged(count), batch_size=8, seed=3, order=order)
    assert batches.steps_per_epoch == -(-count // 8)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert sorted(i for step in steps for i in numbers(batches.batch(step))) == list(range(count))


def test_resuming_at_any_step_gives_the_same_batches() -> None:
    first = TrainingBatches(ragged(50), batch_size=8, seed=3)
    uninterrupted = [first.batch(step) for step in range(25)]
    for start in (0, 1, 6, 7, 8, 20):
        resumed = TrainingBatches(ragged(50), batch_size=8, seed=3)
        assert all(same(uninterrupted[step], resumed.batch(step)) for step in range(start, 25))


def test_order_depends_on_seed_and_epoch() -> None:
    first, again, other = (TrainingBatches(ragged(1000), batch_size=8, seed=seed) for seed in (1, 1, 2))
    order = [first.indices(step) for step in range(125)]
    assert order == [again.indices(step) for step in range(125)]
    assert order != [other.indices(step) for step in range(125)]
    assert order != [first.indices(step) for step in range(125, 250)]


def test_batches_pad_little_but_lengths_come_in_no_order() -> None:
    batches = TrainingBatches(ragged(2000), batch_size=8, seed=0)
    epoch = [batches.batch(step) for step in range(batches.steps_per_epoch)]
    slots, tokens = sum(b.input_ids.numel() for b in epoch), sum(b.tokens for b in epoch)
    assert 1 - tokens / slots < 0.06
    widths = [float(b.input_ids.shape[1]) for b in epoch]
    correlation = torch.corrcoef(torch.tensor([widths[:-1], widths[1:]]))[0, 1]
    assert abs(correlation) < 0.3


def test_texts_that_begin_alike_come_together_among_those_of_about_one_length() -> None:
    draw = np.random.default_rng(0)
    examples = [EncodedExample((int(draw.integers(50)), *range(draw.integers(5, 40))), (1,)) for _ in range(1000)]

    def seen(order: Order) -> tuple[float, int]:
        batches = TrainingBatches(examples, batch_size=8, seed=0, order=order)
        rows = [[examples[index] for index in batches.indices(step)] for step in range(batches.steps_per_epoch)]
        first = np.mean([len({row.prompt[0] for row in batch}) for batch in rows])
        return float(first), max(len(max(batch, key=len)) - len(min(batch, key=len)) for batch in rows)

    (apart, _), (together, widest) = seen("length"), seen("beginnings")
    assert together < 0.8 * apart
    assert widest < 2 * NEAR


def test_batches_at_random_are_of_like_size() -> None:
    def rows(order: Order) -> list[int]:
        batches = TrainingBatches(ragged(2000), batch_size=32, seed=0, order=order)
        return [sum(len(batches.examples[index]) for index in batches.indices(step)) for step in range(62)]

    by_length, at_random = np.array(rows("length")), np.array(rows("random"))
    assert at_random.std() < by_length.std() / 3
    assert at_random.max() < by_length.max()


def test_evaluation_sees_every_example_once_by_length() -> None:
    batches = list(in_order(ragged(21), batch_size=8))
    assert [len(numbers(batch)) for batch in batches] == [8, 8, 5]
    assert sorted(i for batch in batches for i in numbers(batch)) == list(range(21))
    lengths = [length for batch in batches for length in batch.attention_mask.sum(1).tolist()]
    assert lengths == sorted(lengths)


def test_faulty_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size: expected 1 or more; found 0"):
        TrainingBatches(ragged(3), batch_size=0, seed=0)
    with pytest.raises(ConfigError, match="--seed: expected 0 or more; found -1"):
        TrainingBatches(ragged(3), batch_size=1, seed=-1)
    with pytest.raises(DataError, match="expected at least one example"):
        TrainingBatches([], batch_size=1, seed=0)


def test_pairs_are_padded_apart_and_counted_together() -> None:
    examples = [EncodedExample((5, 6, 7), (8,)), EncodedExample((9,), (1, 2))]
    batch = collate_pairs(examples, pad_id=4)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 4, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[8, IGNORED], [1, 2]]
    assert (batch.tokens, batch.target_tokens) == (7, 3)
