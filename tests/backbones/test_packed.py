"""Packed rows: every example as if it were alone with its prefix, whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.decoder import Decoder
from prefixkit.data.batches import IGNORED, Batch, EncodedExample, collate
from prefixkit.data.packing import PackedBatch, pack
from prefixkit.errors import BackboneError
from prefixkit.injections import KeyValuePrefix, PackedPrefixes, Several, packed_prefixes, row_prefixes
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import EFFECT, wrap
from tests.backbones.test_rows import THROUGH_CACHE, several
from tests.ragged import alone, prompts, to_double

FAMILIES = [family for family in CONFIGS if family not in THROUGH_CACHE]
OWNER = torch.tensor([0, 2, 2, 0])
"""Of the examples below; the second prefix has none."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def rows() -> list[Tensor]:
    """Four rows of 5, 20, 11 and 20 tokens, the longer ones longer than a window."""
    return [*prompts(), prompts()[1].flip(0)]


def examples() -> list[EncodedExample]:
    return [EncodedExample(tuple(row[:3].tolist()), tuple(row[3:].tolist())) for row in rows()]


def packed(batch: PackedBatch, prefixes: list[KeyValuePrefix], owner: Tensor = OWNER) -> PackedPrefixes:
    return packed_prefixes(prefixes, owner, batch.segments, batch.positions)


def logits_of(decoder: Decoder, texts: list[Tensor], prefixes: list[KeyValuePrefix]) -> list[Tensor]:
    """[seq, vocab] of each text, all in one row."""
    batch = pack([EncodedExample(tuple(text.tolist()), ()) for text in texts], bucket=16)
    assert -1 in batch.segments
    with torch.no_grad():
        found = decoder.logits(batch.input_ids, batch.attention_mask, packed(batch, prefixes))
    return [found[0][batch.segments[0] == index] for index in range(len(texts))]


def loss_and_gradients(
    decoder: Decoder, batch: Batch, received: Several, leaves: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    wanted = batch.labels[batch.labels != IGNORED]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(wanted), generator=generator).to(leaves[0].dtype)

    def loss_of(logits: Tensor, part: slice) -> Tensor:
        return (F.cross_entropy(logits, wanted[part], reduction="none") * weights[part]).sum()

    with decoder.targets(batch.input_ids, batch.attention_mask, batch.labels, received) as targets:
        loss = targets.summed(loss_of)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_padded_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Eager attention asks for a softmax in float32, which would round float64 away.
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype: torch.softmax(scores, dim))
    exact = torch.float32 if family == "qwen3_moe" else torch.float64  # its experts know no float64
    decoder = wrap(tiny(family).to(exact).requires_grad_(False))
    prefixes = [to_double(one) if exact == torch.float64 else one for one in several(decoder.model)]
    leaves = [tensor.requires_grad_() for one in prefixes for tensor in (*one.keys, *one.values)]
    filled, rectangular = pack(examples(), bucket=16), collate(examples())
    loss, gradients = loss_and_gradients(decoder, filled, packed(filled, prefixes), leaves)
    expected, others = loss_and_gradients(decoder, rectangular, row_prefixes(prefixes, OWNER), leaves)
    assert abs(loss - expected) <= TOLERANCE[exact] * max(1.0, abs(float(expected)))
    for found, right in zip(gradients, others, strict=True):
        assert (found - right).abs().max() <= TOLERANCE[exact] * max(1.0, float(right.abs().max()))
    assert sum(bool(one.abs().max() > 1e-3) for one in gradients) == 2 * len(gradients) // 3


@pytest.mark.parametrize("family", FAMILIES)
def test_each_example_equals_itself_alone(family: str) -> None:
    decoder = wrap(tiny(family))
    prefixes = several(decoder.model)
    found = logits_of(decoder, rows(), prefixes)
    decoder.release()
    with torch.no_grad():
        for row, owner, own in zip(rows(), OWNER, found, strict=True):
            assert (own - alone(decoder.model, row, prefixes[owner])).abs().max() <= 1e-5
            assert (own - alone(decoder.model, row, prefixes[1])).abs().max() > EFFECT
            assert (own - alone(decoder.model, row, None)).abs().max() > EFFECT


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window"])
def test_nothing_of_an_example_or_of_a_prefix_reaches_the_others(family: str) -> None:
    decoder = wrap(tiny(family))
    prefixes = several(decoder.model)
    before = logits_of(decoder, rows(), prefixes)
    texts = rows()
    texts[1] = texts[1].roll(1)
    changed = logits_of(decoder, texts, prefixes)
    assert [torch.equal(*pair) for pair in zip(before, changed, strict=True)] == [True, False, True, True]
    prefixes[2] = replace(prefixes[2], keys=tuple(key * 2 for key in prefixes[2].keys))
    changed = logits_of(decoder, rows(), prefixes)
    assert [torch.equal(*pair) for pair in zip(before, changed, strict=True)] == [True, False, False, True]


def test_a_token_does_not_see_what_follows_it() -> None:
    decoder, texts = wrap(tiny("llama")), rows()
    prefixes = several(decoder.model)
    before = logits_of(decoder, texts, prefixes)[1]
    texts[1][12] += 1
    after = logits_of(decoder, texts, prefixes)[1]
    assert torch.equal(before[:12], after[:12])
    assert (before[12:] - after[12:]).abs().amax(dim=1).min() > 1e-3


def test_text_starts_where_each_prefix_says() -> None:
    decoder = wrap(tiny("llama"))
    prefixes = [
        replace(one, positions=replace(one.positions, text_start=one.length * 3)) for one in several(decoder.model)
    ]
    found = logits_of(decoder, rows(), prefixes)
    with torch.no_grad():
        for row, owner, own in zip(rows(), OWNER, found, strict=True):
            right = decoder.logits(row[None], prefix=prefixes[owner])[0]
            assert (own - right).abs().max() <= 1e-5


# Its new name is newer than the oldest transformers that we take.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
def test_checkpointed_layers_give_the_same_gradients() -> None:
    decoder = wrap(tiny("gemma3").double().requires_grad_(False))
    prefixes = [to_double(one) for one in several(decoder.model)]
    leaves = [tensor.requires_grad_() for one in prefixes for tensor in (*one.keys, *one.values)]
    batch = pack(examples(), bucket=16)
    _, expected = loss_and_gradients(decoder, batch, packed(batch, prefixes), leaves)
    decoder.model.gradient_checkpointing_enable()
    decoder.model.train()
    _, found = loss_and_gradients(decoder, batch, packed(batch, prefixes), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10


@pytest.mark.parametrize("family", THROUGH_CACHE)
def test_a_prefix_that_goes_through_the_cache_takes_no_packed_row(family: str) -> None:
    decoder = wrap(tiny(family))
    batch = pack(examples())
    with pytest.raises(BackboneError, match="expected one prefix for all rows"):
        decoder.logits(batch.input_ids, prefix=packed(batch, several(decoder.model)))


def test_the_next_batch_may_be_padded_again() -> None:
    decoder, row = wrap(tiny("llama")), prompts()[0][None]
    prefixes = several(decoder.model)
    with torch.no_grad():
        before = decoder.logits(row, prefix=prefixes[0])
        logits_of(decoder, rows(), prefixes)
        assert torch.equal(decoder.logits(row, prefix=prefixes[0]), before)
