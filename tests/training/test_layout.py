"""Padded rows and a packed row are one training: the same losses, gradients and validations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixkit.backbones import decoder
from prefixkit.backbones.trie import trie
from prefixkit.data.batches import collate
from prefixkit.data.masked import collate_masked
from prefixkit.data.packing import pack, pack_masked
from prefixkit.errors import ConfigError
from prefixkit.prefix import load
from prefixkit.training import checkpoint, layout, loop
from prefixkit.training.classification import log_likelihoods
from prefixkit.training.objectives import Distillation
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.reading import answers
from prefixkit.training.sweep import sweep
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap
from tests.backbones.test_packed import examples
from tests.encoder_decoders import folder_of
from tests.encoders import encoder_folder
from tests.ragged import random_prefix, to_double
from tests.training.test_answer_commands import TASKS
from tests.training.test_loop import Interrupted, settings
from tests.training.test_sweep import Presses, given

Folder = Callable[..., Path]
METHODS: dict[str, dict[str, Any]] = {
    "prefix-tuning": {"length": 5, "reparameterization": "mlp", "bottleneck": 16},
    "prompt-tuning": {"length": 3},
    "p-tuning-v2": {"length": 5},
}
CANNOT: dict[str, tuple[str, dict[str, Any], str]] = {
    "cache": ("falcon", {}, "falcon, whose attention goes its own way in transformers"),
    "bitfit": ("gpt2", {"method": {"name": "bitfit"}}, "something else than keys and values before the text"),
}


def first_step(prepared: Prepared) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first step, in float64."""
    prepared.backbone.model.double()
    prepared.method.double()
    prepared.batches.order = "length"
    received = prepared.method()
    loss = prepared.objective(prepared.backbone, prepared.batches.batch(0), received)
    return loss.item(), list(torch.autograd.grad(loss, list(prepared.method.parameters())))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same(backbone_folder: Folder, records: Path, tmp_path: Path, method: str) -> None:
    folder, chosen = backbone_folder("llama"), {"name": method, **METHODS[method]}
    made = [
        prepare(settings(folder, records, tmp_path / "p", layout=layout, method=chosen))
        for layout in ("packed", "padded")
    ]
    assert [one.batches.collate for one in made] == [pack, collate]
    (loss, found), (other, expected) = map(first_step, made)
    assert loss == pytest.approx(other, rel=1e-10)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))
    assert max(one.abs().max() for one in found) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_run_is_the_same_and_so_is_its_file(
    backbone_folder: Folder, records: Path, tmp_path: Path, family: str
) -> None:
    heard = {}
    for chosen in ("packed", "padded"):
        heard[chosen] = Interrupted()
        made = prepare(settings(backbone_folder(family), records, tmp_path / chosen, layout=chosen))
        made.batches.order = "length"
        loop.complete(made, resume=False, listener=heard[chosen])
    packed, padded = heard["packed"], heard["padded"]
    assert packed.losses == pytest.approx(padded.losses, abs=1e-5 * max(padded.losses))
    assert [one.loss for one in packed.validations] == pytest.approx([one.loss for one in padded.validations], rel=1e-5)
    assert packed.messages == padded.messages == []
    records_of = [load(tmp_path / chosen).manifest.provenance.config for chosen in ("packed", "padded")]
    assert records_of[0] == records_of[1], "where rows lie is no part of what was trained"


def test_autoprompt_finds_the_same_tokens(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    found = []
    for chosen, steps in (("packed", 4), ("padded", 4), ("packed", 0)):
        changes = {"method": {"name": "autoprompt", "length": 3}, "layout": chosen, "steps": steps}
        config = settings(backbone_folder("gpt2"), records, tmp_path / f"{chosen}-{steps}", **changes)
        made = prepare(config)
        made.batches.order = "length"
        found.append(loop.complete(made, resume=False, listener=Interrupted()).manifest.injections)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_run_that_shares_beginnings_is_the_same(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    read: list[int] = []
    monkeypatch.setattr(decoder, "trie", lambda *given: read.append(1) or trie(*given))
    heard, tries = {}, {}
    for chosen in ("auto", "padded"):
        heard[chosen] = Interrupted()
        made = prepare(settings(backbone_folder(family), records, tmp_path / chosen, layout=chosen))
        made.batches.order = "beginnings"
        loop.complete(made, resume=False, listener=heard[chosen])
        tries[chosen] = len(read)
    auto, padded = heard["auto"], heard["padded"]
    assert tries["padded"] == tries["auto"] > len(auto.losses), "the one shares beginnings, the other does not"
    assert auto.losses == pytest.approx(padded.losses, abs=1e-5 * max(padded.losses))
    assert [one.loss for one in auto.validations] == pytest.approx([one.loss for one in padded.validations], rel=1e-5)
    records_of = [load(tmp_path / chosen).manifest.provenance.config for chosen in ("auto", "padded")]
    assert records_of[0] == records_of[1], "what is computed once is no part of what was trained"


@pytest.mark.parametrize(
    ("begun", "ended"), [("packed", "padded"), ("padded", "packed"), ("auto", "padded"), ("padded", "auto")]
)
def test_a_run_may_be_resumed_in_the_other_layout(
    backbone_folder: Folder, records: Path, tmp_path: Path, begun: str, ended: str
) -> None:
    """It goes on with the batches of its order, which are others in the order of the other layout."""
    straight, broken = Interrupted(), Interrupted(8)
    loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "one", layout=begun), listener=straight)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "two", layout=begun), listener=broken)
    resumed = Interrupted()
    loop.train(
        settings(backbone_folder("gpt2"), records, tmp_path / "two", layout=ended), resume=True, listener=resumed
    )
    assert [*broken.losses, *resumed.losses] == pytest.approx(straight.losses, rel=1e-5)


def test_a_packed_run_that_was_interrupted_ends_in_the_same_bytes(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    config = settings(backbone_folder("gpt2"), records, tmp_path / "out", layout="packed")
    loop.train(config)
    expected = (tmp_path / "out").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, listener=Interrupted(8))
    assert (tmp_path / "out").read_bytes() != expected
    loop.train(config, resume=True)
    assert (tmp_path / "out").read_bytes() == expected


def test_a_state_from_before_the_order_was_kept_goes_on_by_length(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    ready = prepare(settings(backbone_folder("gpt2"), records, tmp_path / "out", layout="packed"))
    assert ready.batches.order == "random"
    path, optimizer = checkpoint.save(ready, loop.make_optimizer(ready), checkpoint.State()), loop.make_optimizer(ready)
    stored = torch.load(path, weights_only=True)
    del stored["order"]
    torch.save(stored, path)
    checkpoint.restore(ready, optimizer)
    assert ready.batches.order == "length"


def test_a_teacher_is_imitated_in_a_packed_row() -> None:
    decoder = wrap(tiny("llama").double().requires_grad_(False))
    teacher, pupil = (to_double(random_prefix(decoder.model, length, length)) for length in (9, 4))
    leaves = [tensor.requires_grad_() for tensor in (*pupil.keys, *pupil.values)]
    learn, results = Distillation(teacher), []
    for batch in (pack(examples()), collate(examples())):
        loss = learn(decoder, batch, pupil)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_packed_is_refused_where_that_was_asked_for(
    backbone_folder: Folder, records: Path, tmp_path: Path, case: str
) -> None:
    family, changes, reason = CANNOT[case]
    config = settings(backbone_folder(family), records, tmp_path / "p", layout="packed", **changes)
    with pytest.raises(ConfigError, match=f"layout: expected what can be packed; found {reason}; use layout=padded"):
        prepare(config)


@pytest.mark.parametrize("case", [None, *CANNOT])
def test_auto_packs_where_that_is_faster_and_says_where_it_cannot(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str | None
) -> None:
    family, changes, reason = CANNOT[case] if case else ("gpt2", {}, "")
    config = settings(backbone_folder(family), records, tmp_path / "p", steps=1, layout="auto", **changes)
    assert prepare(config).batches.collate is collate, "on a CPU"
    monkeypatch.setattr(layout, "_packs_faster", lambda backbone: True)
    assert prepare(config).batches.collate is (collate if case else pack)
    heard = Interrupted()
    loop.train(config, listener=heard)
    assert heard.messages == ([f"batches are padded: no packed row for {reason}"] if case else [])


def test_a_sweep_says_it_once(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_packs_faster", lambda backbone: True)
    heard = Presses()
    asked = given(backbone_folder("falcon"), records, steps=1, layout="auto")
    sweep(asked, {"seed": [0, 1]}, tmp_path / "out", listener=heard)
    assert sum("batches are padded: no packed row for falcon" in message for message in heard.messages) == 1


@pytest.mark.parametrize("answer", TASKS)
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_what_a_head_answers_is_the_same(
    backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, answer: str
) -> None:
    # Heads answer in float32, which would round float64 away.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    folder = backbone_folder("gpt2") if family == "gpt2" else encoder_folder(family, tmp_path / family)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(TASKS[answer][0](index)) + "\n" for index in range(12)))
    changes = {"task": answer, "method": {"name": "p-tuning-v2", "length": 3}, "eval_data": None}
    made = [prepare(settings(folder, data, tmp_path / "p", layout=one, **changes)) for one in ("packed", "padded")]
    assert "segments" in made[0].batches.batch(0).inputs
    (loss, found), (other, expected) = map(first_step, made)
    assert loss == pytest.approx(other, rel=1e-10)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))
    # A bias that all choices, or all tokens, have in common moves none of them.
    common = answer in ("multiple-choice", "question-answering")
    assert sum(bool(one.abs().max() > 1e-6) for one in found) >= len(found) - common
    chosen = [
        answers(one.backbone, one.batches.examples, one.method(), one.batches.collate, batch_size=5) for one in made
    ]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("objective", ["vocabulary", "labels"])
def test_words_at_a_mask_are_the_same(tmp_path: Path, objective: str) -> None:
    folder, data, task = encoder_folder("roberta", tmp_path / "roberta"), tmp_path / "d.jsonl", tmp_path / "t.toml"
    task.write_text('input_template = "{cls}{text} is {mask}"\n[verbalizer]\na = "x"\nb = "y"\n')
    data.write_text("".join(json.dumps({"text": "the " * (1 + i), "label": "ab"[i % 2]}) + "\n" for i in range(8)))
    changes = {"task": str(task), "objective": objective, "method": {"name": "p-tuning-v2", "length": 3}}
    made = [prepare(settings(folder, data, tmp_path / "p", layout=one, **changes)) for one in ("packed", "padded")]
    assert [one.batches.collate for one in made] == [pack_masked, collate_masked]
    (loss, found), (other, expected) = map(first_step, made)
    assert loss == pytest.approx(other, rel=1e-10)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))
    scores = [log_likelihoods(one.backbone, one.batches.batch(0), one.method()) for one in made]
    assert torch.allclose(scores[0], scores[1], rtol=1e-5)
    assert len(scores[0].unique()) > 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bart", "bart, whose prompts and targets are two sequences"), ("vit", "vit, whose inputs all have one length")],
)
def test_pairs_and_images_stay_padded(records: Path, tmp_path: Path, kind: str, reason: str) -> None:
    if kind == "vit":
        folder, data = encoder_folder("vit", tmp_path / "vit"), tmp_path / "images.npz"
        pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
        np.savez(data, images=pixels, labels=np.arange(8) % 2)
        changes: dict[str, Any] = {"method": {"name": "visual-prompt-tuning"}, "task": "images"}
    else:
        folder, data, changes = folder_of("bart", tmp_path / "bart"), records, {}
    asked = settings(folder, data, tmp_path / "p", layout="packed", **{"eval_data": None, **changes})
    with pytest.raises(ConfigError, match=f"expected what can be packed; found {reason}; use layout=padded"):
        prepare(asked)
