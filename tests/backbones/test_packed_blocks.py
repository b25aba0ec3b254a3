"""FlexAttention against the mask written out: by its reference, which looks at pairs, and its blocks by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from prefixkit.backbones import packed as packing
from prefixkit.backbones.compiled import compile_stacks
from prefixkit.backbones.packed import attend, blocks, dense, obstacle
from prefixkit.data.batches import EncodedExample
from prefixkit.data.packing import pack
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix, PackedPrefixes, packed_prefixes
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.backbones.test_packed import examples, loss_and_gradients, packed
from tests.backbones.test_rows import THROUGH_CACHE, several
from tests.compiling import COMPILING
from tests.ragged import to_double

WINDOW = 40
SDPA = F.scaled_dot_product_attention
LENGTHS = ((150, 20, 7), (300, 3, 90, 1, 200, 128, 50))
"""Of prefixes, and of examples."""
OWNER = torch.tensor([1, 0, 2, 2, 0, 1, 2])
pytestmark = COMPILING


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the advice to compile, and with the gradients that torch does not offer on a CPU though it knows them."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def row(owner: Tensor = OWNER, lengths: tuple[tuple[int, ...], tuple[int, ...]] = LENGTHS) -> PackedPrefixes:
    """Seven examples and three prefixes, in blocks of 128 that none of them fits."""
    batch = pack([EncodedExample((1,) * length, ()) for length in lengths[1]])
    generator = torch.Generator().manual_seed(0)
    prefixes = []
    for length in lengths[0]:
        key, value = torch.randn(2, 2, length, 16, generator=generator).unbind()
        prefixes.append(KeyValuePrefix(keys=(key,), values=(value,), positions=Positions(text_start=length)))
    return packed_prefixes(prefixes, owner, batch.segments, batch.positions)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_mask_is_as_it_is_meant(window: int | None) -> None:
    """Pair by pair, in another way than the mask is made."""
    lengths = ((3, 5), (4, 2, 41))
    made = dense(row(torch.tensor([1, 0, 1]), lengths), window)[0, 0]
    slots = [(owner, place) for owner, length in enumerate(lengths[0]) for place in range(length)]
    tokens = [(example, place) for example, length in enumerate(lengths[1]) for place in range(length)]
    assert made.shape == (128, len(slots) + 128)
    for query, (example, place) in enumerate(tokens):
        owner = (1, 0, 1)[example]
        within = lengths[0][owner] + place
        own = [who == owner and (window is None or within - j < window) for who, j in slots]
        own += [other == example and 0 <= place - i < (window or 128) for other, i in tokens]
        assert made[query].tolist() == [*own, *[False] * (128 - len(tokens))]
    assert made.any(dim=1).all(), "a softmax over nothing is no number"
    assert not made[len(tokens) :, : len(slots) + len(tokens)].any(), "what fills the row up sees itself alone"


@pytest.mark.parametrize("owner", [OWNER, OWNER.sort().values])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_no_block_is_left_out_that_holds_anything_to_see(owner: Tensor, window: int | None) -> None:
    laid = row(owner)
    whole = dense(laid, window)[0, 0]
    filled = F.pad(whole, (0, -whole.shape[1] % 128))
    wanted = filled.view(filled.shape[0] // 128, 128, -1, 128).any(dim=3).any(dim=1)
    found = blocks(laid, window).to_dense()[0, 0].bool()
    assert found.shape == wanted.shape
    assert not (wanted & ~found).any()
    assert found.sum() < 0.75 * found.numel(), "and not all are kept"


def test_all_blocks_of_sorted_owners_hold_something_to_see() -> None:
    whole = dense(row(OWNER.sort().values), None)[0, 0]
    filled = F.pad(whole, (0, -whole.shape[1] % 128))
    wanted = filled.view(filled.shape[0] // 128, 128, -1, 128).any(dim=3).any(dim=1)
    found = blocks(row(OWNER.sort().values), None).to_dense()[0, 0].bool()
    assert (found & ~wanted).sum() <= 0.1 * wanted.sum()


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_attention_in_blocks_equals_the_mask_written_out(window: int | None, cap: float | None) -> None:
    laid = row()
    queries, columns = len(laid.examples), laid.length + len(laid.examples)
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 4, queries, 16), (1, 2, columns, 16), (1, 2, columns, 16), (1, queries, 4, 16))
    *tensors, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    mask = blocks(laid, window)
    found, _ = attend(SDPA, torch.nn.Identity(), query, key, value, mask, scaling=0.3, softcap=cap)
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.3
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    shares = scores.masked_fill(~dense(laid, window), -torch.inf).softmax(dim=-1)
    expected = (shares @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert (found - expected).abs().max() <= 1e-10
    ours, theirs = (torch.autograd.grad((made * weights).sum(), tensors) for made in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-10


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "mistral_window"])
def test_models_in_blocks_equal_themselves_with_the_mask_written_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype: torch.softmax(scores, dim))
    decoder = wrap(tiny(family).double().requires_grad_(False))
    prefixes = [to_double(one) for one in several(decoder.model)]
    leaves = [tensor.requires_grad_() for one in prefixes for tensor in (*one.keys, *one.values)]
    batch = pack(examples(), bucket=16)
    loss, gradients = loss_and_gradients(decoder, batch, packed(batch, prefixes), leaves)
    monkeypatch.setattr(packing, "_in_blocks", lambda model: True)
    masks: list[object] = []
    made = packing.blocks
    monkeypatch.setattr(packing, "blocks", lambda *given: masks.append(given) or made(*given))
    found, others = loss_and_gradients(decoder, batch, packed(batch, prefixes), leaves)
    assert abs(found - loss) <= 1e-10 * max(1.0, abs(float(loss)))
    for ours, theirs in zip(others, gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))
    assert len(masks) == (2 if family == "gemma2" else 1), "once a pass for each window"


def test_attention_is_compiled_once_for_whatever_lengths_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    compiled = torch.compile(flex_attention.flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(packing, "_flex", lambda device: compiled)
    for number, window in enumerate([None, None, None, WINDOW, None, WINDOW]):
        laid = row(OWNER[: 2 + number] % 2, ((20 + number, 5), LENGTHS[1][: 2 + number]))
        columns = laid.length + len(laid.examples)
        query, (key, value) = torch.zeros(1, 4, len(laid.examples), 16), torch.zeros(2, 1, 2, columns, 16).unbind()
        with torch.no_grad():
            attend(SDPA, torch.nn.Identity(), query, key, value, blocks(laid, window))
    assert counter.frame_count == 2, "for the first length, then for all"


@pytest.mark.parametrize("keywords", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}])
def test_what_blocks_cannot_express_is_refused(keywords: dict[str, object]) -> None:
    laid = row()
    tensors = (torch.zeros(1, 4, len(laid.examples), 16), *torch.zeros(2, 1, 2, 640, 16).unbind())
    with pytest.raises(BackboneError, match="packed row: expected plain attention"):
        attend(SDPA, torch.nn.Identity(), *tensors, blocks(laid, None), **keywords)


def test_models_whose_attention_does_more_stay_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(obstacle(tiny(family)) is None for family in CONFIGS if family not in THROUGH_CACHE)
    monkeypatch.setattr(packing, "_in_blocks", lambda model: True)
    assert all(obstacle(tiny(family)) is None for family in CONFIGS if family not in THROUGH_CACHE)
    assert (
        obstacle(tiny("gemma2", attn_logit_softcapping=None))
        == "its attention does more than FlexAttention can be told"
    )


@pytest.mark.parametrize("family", ["gpt2", pytest.param("gemma2", marks=pytest.mark.matrix)])
def test_a_compiled_stack_reads_packed_rows_in_one_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for the kernels: rows of several lengths, blocks for each window, one graph without breaks."""
    monkeypatch.setattr(packing, "_in_blocks", lambda model: True)
    decoder = wrap(tiny(family).double().requires_grad_(False))
    prefixes = [to_double(one) for one in several(decoder.model)]
    leaves = [tensor.requires_grad_() for one in prefixes for tensor in (*one.keys, *one.values)]
    rows = [pack(examples(), bucket=bucket) for bucket in (16, 48, 80)]
    expected = [loss_and_gradients(decoder, batch, packed(batch, prefixes), leaves) for batch in rows]
    flex, counter = packing._flex, CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(packing, "_flex", lambda device: flex("cuda"))
    compile_stacks(decoder.model, backend=counter)
    for batch, (loss, gradients) in zip(rows, expected, strict=True):
        found, others = loss_and_gradients(decoder, batch, packed(batch, prefixes), leaves)
        assert abs(found - loss) <= 1e-10 * max(1.0, abs(float(loss)))
        for ours, theirs in zip(others, gradients, strict=True):
            assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))
    assert len([graph for graph in counter.graphs if graph.graph.nodes]) == 1
