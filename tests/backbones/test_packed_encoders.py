"""Packed rows on encoders: every example as if it were alone with its prefix, read in both directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from prefixkit.backbones import packed as packing
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.packed import blocks, dense
from prefixkit.data.batches import IGNORED
from prefixkit.data.labelled_batches import LabelledRow
from prefixkit.data.masked import collate_masked
from prefixkit.data.packing import PackedBatch, pack_masked
from prefixkit.injections import KeyValuePrefix, PackedPrefixes, packed_prefixes, row_prefixes
from tests.backbones.test_packed import loss_and_gradients
from tests.backbones.test_packed_blocks import row
from tests.encoders import MASK, SEP, TEXT, encoder_folder
from tests.ragged import prompts, to_double

OWNER = torch.tensor([0, 2, 2])
"""Of the texts below; the second prefix has none."""
WINDOW = 40
Load = Callable[..., Encoder]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """In float64."""

    def load(family: str) -> Encoder:
        backbone = load_backbone(encoder_folder(family, tmp_path_factory.mktemp(family)))
        assert isinstance(backbone, Encoder)
        backbone.model.double()
        return backbone

    return load


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT asks for float32 where it rotates, which would round float64 away."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)


def texts() -> list[LabelledRow]:
    """Of 5, 20 and 11 tokens, longer than a window, each with two words masked and a separator in it."""
    made = []
    for ids in prompts():
        labels = torch.full_like(ids, IGNORED)
        labels[[1, -2]] = ids[[1, -2]]
        ids[[1, -2]], ids[[2, -1]] = MASK, SEP
        made.append(LabelledRow(tuple(ids.tolist()), tuple(labels.tolist())))
    return made


def several(encoder: Encoder) -> list[KeyValuePrefix]:
    made = []
    for length in (3, 5, 7):
        prefix = encoder.key_values_of(list(range(5, 5 + length)))
        assert isinstance(prefix, KeyValuePrefix)
        made.append(to_double(prefix))
    return made


def packed(batch: PackedBatch, prefixes: list[KeyValuePrefix]) -> PackedPrefixes:
    return packed_prefixes(prefixes, OWNER, batch.segments, batch.positions)


def states_of(encoder: Encoder, rows: list[LabelledRow], prefixes: list[KeyValuePrefix]) -> list[Tensor]:
    """[seq, hidden] of each text, all in one row."""
    batch = pack_masked(rows, bucket=16)
    assert -1 in batch.segments
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        found = encoder.states(inputs, packed(batch, prefixes))
    return [found[0][batch.segments[0] == index] for index in range(len(rows))]


@pytest.mark.parametrize("family", TEXT)
def test_loss_and_gradients_equal_those_of_padded_rows(encoder: Load, family: str) -> None:
    backbone = encoder(family)
    prefixes = several(backbone)
    leaves = [tensor.requires_grad_() for one in prefixes for tensor in (*one.keys, *one.values)]
    filled, rectangular = pack_masked(texts(), bucket=16), collate_masked(texts())
    loss, gradients = loss_and_gradients(backbone, filled, packed(filled, prefixes), leaves)
    expected, others = loss_and_gradients(backbone, rectangular, row_prefixes(prefixes, OWNER), leaves)
    assert abs(loss - expected) <= 1e-10 * max(1.0, abs(float(expected)))
    for found, right in zip(gradients, others, strict=True):
        assert (found - right).abs().max() <= 1e-10 * max(1.0, float(right.abs().max()))
    assert sum(bool(one.abs().max() > 1e-3) for one in gradients) == 2 * len(gradients) // 3


@pytest.mark.parametrize("family", TEXT)
def test_each_text_equals_itself_alone(encoder: Load, family: str) -> None:
    backbone = encoder(family)
    prefixes = several(backbone)
    found = states_of(backbone, texts(), prefixes)
    for text, owner, own in zip(texts(), OWNER, found, strict=True):
        inputs = {"input_ids": torch.tensor([text.ids]), "attention_mask": torch.ones(1, len(text))}
        with torch.no_grad():
            alone, other = (backbone.states(inputs, prefixes[index])[0] for index in (int(owner), 1))
        assert (own - alone).abs().max() <= 1e-10
        assert (own - other).abs().max() > 0.1


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_nothing_of_a_text_reaches_the_others_but_all_of_it_itself(encoder: Load, family: str) -> None:
    backbone, rows = encoder(family), texts()
    prefixes = several(backbone)
    before = states_of(backbone, rows, prefixes)
    rows[1] = LabelledRow((*rows[1].ids[:-1], 9), rows[1].labels)
    after = states_of(backbone, rows, prefixes)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True]
    assert (before[1] - after[1]).abs().amax(dim=1).min() > 1e-3, "its first token sees its last"


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's reference, with the gradients that torch does not offer on a CPU though it knows them."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("family", TEXT)
def test_encoders_in_blocks_equal_themselves_with_the_mask_written_out(
    encoder: Load, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, batch = encoder(family), pack_masked(texts(), bucket=16)
    prefixes = several(backbone)
    leaves = [tensor.requires_grad_() for one in prefixes for tensor in (*one.keys, *one.values)]
    loss, gradients = loss_and_gradients(backbone, batch, packed(batch, prefixes), leaves)
    monkeypatch.setattr(packing, "_in_blocks", lambda model: True)
    found, others = loss_and_gradients(backbone, batch, packed(batch, prefixes), leaves)
    assert abs(found - loss) <= 1e-10 * max(1.0, abs(float(loss)))
    for ours, theirs in zip(others, gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_no_block_is_left_out_that_holds_anything_to_see(window: int | None) -> None:
    laid = row()
    whole = dense(laid, window, causal=False)[0, 0]
    filled = torch.nn.functional.pad(whole, (0, -whole.shape[1] % 128))
    wanted = filled.view(filled.shape[0] // 128, 128, -1, 128).any(dim=3).any(dim=1)
    found = blocks(laid, window, causal=False).to_dense()[0, 0].bool()
    assert not (wanted & ~found).any()
    assert found.sum() < 0.75 * found.numel(), "and not all are kept"


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_mask_is_as_it_is_meant(window: int | None) -> None:
    """Pair by pair, in another way than the mask is made."""
    lengths, owner = ((3, 5), (4, 2, 91)), (1, 0, 1)
    made = dense(row(torch.tensor(owner), lengths), window, causal=False)[0, 0]
    slots = [who for who, length in enumerate(lengths[0]) for _ in range(length)]
    tokens = [(example, place) for example, length in enumerate(lengths[1]) for place in range(length)]
    for query, (example, place) in enumerate(tokens):
        own = [who == owner[example] for who in slots]
        own += [other == example and abs(place - i) < (window or 128) for other, i in tokens]
        assert made[query].tolist() == [*own, *[False] * (128 - len(tokens))]
    assert made.any(dim=1).all(), "a softmax over nothing is no number"
