"""Texts that begin alike, read once: every token as if its text were alone, and gradients those of padded rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixkit.backbones import onednn
from prefixkit.backbones.attention import _causal
from prefixkit.backbones.compiled import compile_stacks
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.packed import obstacle
from prefixkit.backbones.recomputation import recompute
from prefixkit.backbones.short_attention import attend_short_rows
from prefixkit.backbones.trie import trie
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix, ParameterDelta, Received, row_prefixes
from prefixkit.training.preparation import prepare
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import alone, labelled, padded, prompts, random_prefix, to_double
from tests.training.test_loop import settings

READ_IN_ROWS = ("falcon", "bloom", "gemma2")
"""Those that attend in ways of their own, and one by eager attention."""
Folder = Callable[..., Path]


def texts() -> list[Tensor]:
    """Five rows: two that begin alike, one that goes on where another ends, one twice."""
    short, long, other = prompts()
    return [long, torch.cat([long[:9], other]), short, torch.cat([short, other[:4]]), short]


def batch(rows: list[Tensor] | None = None) -> dict[str, Tensor]:
    made = labelled(padded(texts() if rows is None else rows, "right"))
    made["labels"][:, :2] = -100
    return made


def sharing(model: torch.nn.Module) -> Decoder:
    decoder = wrap(model)  # type: ignore[arg-type]
    decoder.shares_beginnings = True
    return decoder


def beginnings() -> int:
    """How many there are, without the last tokens of texts, which predict nothing."""
    return len({tuple(row[:end].tolist()) for row in texts() for end in range(1, len(row))})


def shapes(decoder: Decoder) -> list[tuple[int, ...]]:
    """Of the texts that the model reads from here on; it is first looked at with a single token."""
    seen: list[tuple[int, ...]] = []

    def before(_: Any, given: tuple[Tensor]) -> None:
        seen.extend([tuple(given[0].shape)] if given[0].numel() > 1 else [])

    decoder.model.get_input_embeddings().register_forward_pre_hook(before)
    return seen


def gradients(decoder: Decoder, received: Received, leaves: list[Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    logits = decoder.target_logits(**given, prefix=received)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    return [logits.detach(), *torch.autograd.grad((logits * weights).sum(), leaves)]


def both(decoder: Decoder, received: Received, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and gradients, shared and not."""
    found = gradients(decoder, received, leaves, batch())
    decoder.shares_beginnings = False
    return found, gradients(decoder, received, leaves, batch())


def leaves_of(*prefixes: KeyValuePrefix) -> list[Tensor]:
    return [tensor.requires_grad_() for prefix in prefixes for tensor in (*prefix.keys, *prefix.values)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in parts of the largest number."""
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1.0)) for one, other in pairs)


def test_a_trie_is_made_of_the_beginnings() -> None:
    rows = texts()
    lengths = torch.tensor([len(row) for row in rows])
    made = trie(padded(rows, "right")["input_ids"], lengths, [0] * 5)
    assert made.size == made.ids.shape[1] == len({tuple(row[:end].tolist()) for row in rows for end in range(1, 99)})
    for row, nodes in zip(rows, made.nodes, strict=True):
        assert made.ids[0, nodes[nodes >= 0]].tolist() == row.tolist()
        assert made.depths[0, nodes[nodes >= 0]].tolist() == list(range(len(row)))
    assert made.nodes[0, :9].tolist() == made.nodes[1, :9].tolist()
    assert made.nodes[0, 9] != made.nodes[1, 9]
    assert trie(padded(rows, "right")["input_ids"], lengths, range(5)).size == sum(lengths)  # type: ignore[arg-type]


def test_rows_and_back_are_linear_maps_and_their_gradients_the_transposes() -> None:
    made = trie(padded(texts(), "right")["input_ids"], torch.tensor([20, 20, 5, 9, 5]), [0] * 5).filled(3)
    states = torch.randn(1, 2, made.ids.shape[1], 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(*made.nodes.shape, 2, 3, dtype=torch.float64, requires_grad=True)
    real = (made.nodes >= 0)[:, None, :, None]
    # What fills up is nobody's: neither what stands behind a text nor what stands behind the nodes.
    assert torch.autograd.gradcheck(lambda given: made.rows(given) * real, states)
    assert torch.autograd.gradcheck(lambda given: made.row(given)[:, : made.size], rows)
    assert torch.equal(made.row(made.rows(states).transpose(1, 2))[0, : made.size].transpose(0, 1), states[0, :, :-3])


@pytest.mark.parametrize("family", CONFIGS)
def test_every_target_is_predicted_as_in_a_text_of_its_own(family: str) -> None:
    decoder = sharing(tiny(family).requires_grad_(False))
    prefix, seen = random_prefix(decoder.model), shapes(decoder)
    with torch.no_grad():
        found = decoder.target_logits(**batch(), prefix=prefix)
        assert (seen == [(1, beginnings())]) == (family not in READ_IN_ROWS)
        decoder.release()
        rows = texts()
        expected, without = (
            torch.cat([alone(decoder.model, row, one)[1 : len(row) - 1] for row in rows]) for one in (prefix, None)
        )
    assert (found - expected).abs().max() <= 1e-5
    assert (found - without).abs().max() > 0.1


@pytest.mark.parametrize("short", [False, True])
def test_gradients_are_those_of_padded_rows(short: bool) -> None:
    decoder = sharing(tiny("gpt2").double().requires_grad_(False))
    if short:
        attend_short_rows(decoder.model)
    prefix = to_double(random_prefix(decoder.model))
    found, expected = both(decoder, prefix, leaves_of(prefix))
    assert apart(found, expected) <= 1e-12
    assert min(each.abs().max() for each in found) > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_gradients_of_other_families(family: str) -> None:
    """Their norms work in float32."""
    decoder = sharing(tiny(family).requires_grad_(False))
    prefix = random_prefix(decoder.model)
    found, expected = both(decoder, prefix, leaves_of(prefix))
    assert apart(found, expected) <= 1e-5
    assert min(each.abs().max() for each in found) > 1e-2


def test_gradients_of_many_rows_add_up_in_bfloat16() -> None:
    decoder = sharing(tiny("llama").bfloat16().requires_grad_(False))
    prefix, count = random_prefix(decoder.model), 600
    leaves, weights = leaves_of(prefix), torch.linspace(-1, 1, 320)

    def of(rows: int) -> list[Tensor]:
        logits = decoder.target_logits(**batch([torch.tensor([5, 6, 7])] * rows), prefix=prefix)
        return list(torch.autograd.grad((logits.float() * weights).sum(), leaves))

    assert apart([each / count for each in of(count)], of(1)) <= 0.05


def test_rows_of_one_prefix_share_among_themselves() -> None:
    decoder = sharing(tiny("gpt2").double().requires_grad_(False))
    prefixes = [to_double(random_prefix(decoder.model, length, length)) for length in (3, 5, 7)]
    prefixes[1] = replace(prefixes[1], positions=Positions(text_start=0, prefix_takes_positions=False))
    seen = shapes(decoder)
    leaves, owner = leaves_of(*prefixes), torch.tensor([2, 2, 1, 0, 1])
    found = gradients(decoder, row_prefixes(prefixes, owner), leaves, batch())
    decoder.shares_beginnings = False
    expected = gradients(decoder, row_prefixes(prefixes, owner), leaves, batch())
    assert seen == [(1, 19 + 10 + 4 + 8), (5, 22)]
    assert apart(found, expected) <= 1e-12


def test_what_diverges_takes_nobody_along() -> None:
    decoder = sharing(tiny("gpt2").requires_grad_(False))
    prefixes = [random_prefix(decoder.model, 4, seed) for seed in (0, 1)]
    prefixes[0].values[0].fill_(math.nan)
    leaves = leaves_of(prefixes[1])
    logits = decoder.target_logits(**batch(), prefix=row_prefixes(prefixes, torch.tensor([0, 0, 1, 1, 1])))
    own = logits[-(2 + 6 + 2) :]
    assert own.isfinite().all()
    assert not logits.isfinite().all()
    assert all(each.isfinite().all() for each in torch.autograd.grad(own.sum(), leaves))


def test_what_fills_up_the_nodes_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn.works():
        pytest.skip("no processor with x86's instructions, or no oneDNN")
    monkeypatch.setattr(onednn, "LEAST", 4)
    decoder = sharing(tiny("gpt2").requires_grad_(False))
    bias = torch.zeros(256, requires_grad=True)
    deltas = ParameterDelta(deltas={"h.0.mlp.c_fc.bias": bias})
    expected = both(decoder, deltas, [bias])[1]
    decoder.shares_beginnings = True
    onednn.multiply_by_onednn(decoder.model)
    seen = shapes(decoder)
    found = gradients(decoder, deltas, [bias], batch())
    assert seen == [(1, onednn.filled(beginnings()))]
    assert seen[0][1] > beginnings()
    assert apart(found, expected) <= 1e-5
    assert found[1].abs().max() > 1e-2


def test_layers_that_are_computed_again() -> None:
    decoder = sharing(tiny("gpt2").double().requires_grad_(False))
    prefix = to_double(random_prefix(decoder.model))
    leaves = leaves_of(prefix)
    expected = gradients(decoder, prefix, leaves, batch())
    recompute(decoder.model)
    assert apart(gradients(decoder, prefix, leaves, batch()), expected) <= 1e-12


def _compiled(decoder: Decoder) -> None:
    compile_stacks(decoder.model, backend="eager")


@pytest.mark.parametrize(
    ("rows", "side", "change"),
    [
        (prompts(), "left", lambda decoder: None),
        ([row[:5] for row in prompts()], "right", lambda decoder: None),
        (texts(), "right", lambda decoder: decoder.model.train()),
        (texts(), "right", _compiled),
        (texts(), "right", lambda decoder: setattr(decoder, "shares_beginnings", False)),
    ],
    ids=["padding on the left", "nothing in common", "dropout", "compiled", "not asked for"],
)
def test_what_is_read_in_rows(rows: list[Tensor], side: str, change: Callable[[Decoder], Any]) -> None:
    decoder = sharing(tiny("gpt2").requires_grad_(False))
    change(decoder)
    seen = shapes(decoder)
    given = labelled({name: each[:, : 5 if len(rows[0]) == 5 else None] for name, each in padded(rows, side).items()})
    decoder.target_logits(**given, prefix=random_prefix(decoder.model))
    assert seen == [(len(rows), given["labels"].shape[1] - 1)]


def test_tokens_that_see_what_follows_share_nothing() -> None:
    decoder = sharing(tiny("gemma3", use_bidirectional_attention=True).requires_grad_(False))
    prefix = random_prefix(decoder.model)
    leaves, seen = leaves_of(prefix), shapes(decoder)
    found, expected = both(decoder, prefix, leaves)
    assert seen == [(5, 22)] * 2
    assert apart(found, expected) == 0
    assert obstacle(decoder.model) == "its tokens see what follows them"


def test_a_batch_without_a_target_has_no_logits() -> None:
    decoder = sharing(tiny("gpt2"))
    given = batch()
    given["labels"].fill_(-100)
    assert decoder.target_logits(**given, prefix=random_prefix(decoder.model)).shape == (0, 320)
    given["labels"][0, 3] = given["input_ids"][0, 3]
    assert decoder.target_logits(**given, prefix=random_prefix(decoder.model)).shape == (1, 320)


@pytest.mark.parametrize(
    ("settings_of", "shares"),
    [({}, True), ({"layout": "padded"}, False), ({"layout": "packed"}, False), ({"compile": "on"}, False)],
)
def test_a_run_shares_beginnings_unless_something_else_is_asked_for(
    backbone_folder: Folder, records: Path, tmp_path: Path, settings_of: dict[str, str], shares: bool
) -> None:
    prepared = prepare(settings(backbone_folder("gpt2"), records, tmp_path / "p", **settings_of))
    assert prepared.backbone.reads_tries == (prepared.batches.order == "beginnings") == shares


def test_where_nothing_can_be_shared_the_order_is_that_of_lengths(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    prepared = prepare(settings(backbone_folder("falcon"), records, tmp_path / "p"))
    assert not prepared.backbone.reads_tries
    assert prepared.batches.order == "length"


def test_masks_are_those_of_windows() -> None:
    states = torch.zeros(1, 1, 4, 2)
    made = {window: _causal(states, states, window)[0, 0].int().tolist() for window in (None, 2)}
    assert made[None] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert made[2] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
