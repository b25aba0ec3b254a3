"""What methods keep in slots: folding, every vector's gradient, the search's promise, the labels' words, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from prefixkit import TrainConfig, attach
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.identity import memory_digest
from prefixkit.cli import run
from prefixkit.errors import BackboneError, ConfigError
from prefixkit.injections import EmbeddingPrompt
from prefixkit.methods.autoprompt import AutoPrompt
from prefixkit.prefix import load
from prefixkit.task import load_tokenizer
from prefixkit.training.config import method_settings
from prefixkit.training.examples import read
from prefixkit.training.hotflip import HotFlip
from prefixkit.training.label_search import label_words
from prefixkit.training.objectives import AmongLabels
from prefixkit.training.preparation import Prepared, prepare
from tests.encoders import encoder_folder

Folder = Callable[..., Path]
CLOZE = 'input_template = "{cls}{slot}{slot}{mask}{slot} {text}{sep}"\nseparator = ""\n'
WRITTEN = 'input_template = "{slot}{slot} {text} {slot} is"\nseparator = ""\n'
NAMED = '[verbalizer]\na = "Sp"\nb = "Ki"\n'
WORDS = 'target_template = " {target}"\n' + NAMED
"""Tokens with their space, and others without it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Folder) -> Path:
    path = tmp_path_factory.mktemp("slots")
    encoder_folder("roberta", path / "encoder")
    (path / "decoder").symlink_to(backbone_folder("gpt2"))
    said = ["the pub", "a mill", "the river", "an eagle"]
    rows = [{"text": f"{said[i % 4]} near {said[i % 3]}", "label": "ab"[i % 2]} for i in range(24)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, template in (("encoder", CLOZE), ("decoder", WRITTEN)):
        (path / f"{kind}.toml").write_text(template + WORDS)
    return path


def prepared(folder: Path, kind: str, method: dict[str, str], task: str = "", **more: str) -> Prepared:
    """A run before its first step."""
    torch.manual_seed(0)
    if task:
        (folder / "other.toml").write_text(task)
    config = TrainConfig(
        backbone=str(folder / kind),
        data=str(folder / "data.jsonl"),
        output=str(folder / "unwritten"),
        task=str(folder / f"{'other' if task else kind}.toml"),
        steps=3,
        method=method_settings(method),
        **more,
    )
    return prepare(config)


def loss(run: Prepared, received: EmbeddingPrompt) -> torch.Tensor:
    return run.objective(run.backbone, run.batches.batch(0), received)


@pytest.mark.parametrize("network", ["lstm", "mlp"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_folded_equals_unfolded_and_every_slot_learns(folder: Path, kind: str, network: str) -> None:
    run = prepared(folder, kind, {"name": "p-tuning", "encoder": network})
    made = run.method()
    assert isinstance(made, EmbeddingPrompt)
    made.embeddings.retain_grad()
    before, total = memory_digest(run.backbone.model), loss(run, made)
    total.backward()
    assert made.embeddings.grad is not None
    assert made.embeddings.grad.shape[0] == 3
    assert (made.embeddings.grad.abs().sum(dim=1) > 1e-6).all()
    with torch.no_grad():
        folded = loss(run, run.method.fold())
        moved = loss(run, EmbeddingPrompt(**{**vars(made), "embeddings": made.embeddings.flip(0)}))
    assert abs(folded - total) <= 1e-5
    assert abs(moved - total) > 1e-3
    assert memory_digest(run.backbone.model) == before
    assert all(parameter.grad is None for parameter in run.backbone.model.parameters())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_no_candidate_is_accepted_that_is_worse(folder: Path, kind: str) -> None:
    """On the batch that the search looks at, whose loss is never larger after a step."""
    run = prepared(folder, kind, {"name": "autoprompt", "init": "mask" if kind == "encoder" else "text"})
    assert isinstance(run.method, AutoPrompt)
    optimizer = HotFlip(run.method, lr=1.0)
    losses = [loss(run, run.method()).item()]
    for _ in range(6):
        loss(run, run.method()).backward()
        with torch.no_grad():
            optimizer.step(lambda: loss(run, run.method()).item())
        optimizer.zero_grad()
        losses.append(loss(run, run.method()).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    given = run.method()
    assert torch.equal(given.embeddings, run.backbone.vocabulary[list(given.token_ids or ())])


def test_the_words_of_labels_are_those_that_targets_have(folder: Path) -> None:
    """With the space that the target template puts before them, in the objective and in AutoPrompt's filter."""
    run = prepared(folder, "encoder", {"name": "p-tuning"}, objective="labels")
    assert isinstance(run.objective, AmongLabels)
    tokenizer = load_tokenizer(folder / "encoder")
    spaced = tuple(tokenizer.encode_text(word)[0] for word in (" Sp", " Ki"))
    assert run.objective.words == spaced
    batch = run.batches.batch(0)
    assert set(batch.labels[batch.labels >= 0].tolist()) == set(spaced)
    logits = run.backbone.target_logits(batch.input_ids, batch.attention_mask, batch.labels, run.method())
    shares = torch.log_softmax(logits[:, list(spaced)], dim=1)
    right = [spaced.index(token) for token in batch.labels[batch.labels >= 0].tolist()]
    assert abs(-shares[range(len(right)), right].sum() - loss(run, run.method())) <= 1e-4
    search = prepared(folder, "encoder", {"name": "autoprompt"}).method
    assert isinstance(search, AutoPrompt)
    assert set(spaced) <= set(search.excluded.tolist())


def test_label_words_are_such_that_a_verbalizer_can_name_them(folder: Path) -> None:
    asked = 'answer = "label"\nlabels = ["a", "b"]\ninput_template = "{cls}{text}{mask}"\n'
    spaced = asked + 'target_template = " {target}"\n'
    tokenizer = load_tokenizer(folder / "encoder")
    for text, space in ((asked, ""), (spaced, " ")):
        run = prepared(folder, "encoder", {"name": "p-tuning-v2"}, text)
        assert isinstance(run.backbone, Encoder)
        found = label_words(run.backbone, run.task, tokenizer, examples(folder, run), words=5, steps=20)
        assert [len(words) for words in found.values()] == [5, 5]
        assert all(len(tokenizer.encode_text(space + word)) == 1 for words in found.values() for word in words)
    run = prepared(folder, "encoder", {"name": "p-tuning-v2"}, asked + 'target_template = "so {target}"\n')
    with pytest.raises(ConfigError, match="expected a target_template that writes a word alone"):
        label_words(run.backbone, run.task, tokenizer, examples(folder, run), steps=1)


def examples(folder: Path, run: Prepared) -> list[object]:
    return read(folder / "data.jsonl", run.task)


@pytest.mark.parametrize(
    ("kind", "task", "told"),
    [
        ("decoder", 'target_template = "{target}{slot}"\n', "expected a target_template without slots"),
        ("decoder", 'bos = "before"\nseparator = "{slot}"\n', 'bos = "after" or "none" for a task with slots'),
    ],
)
def test_slots_that_no_prompt_can_stand_in_are_refused(folder: Path, kind: str, task: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepared(folder, kind, {"name": "prompt-tuning"}, 'input_template = "{text}"\n' + task + NAMED)


@pytest.mark.parametrize(
    ("kind", "model", "formats"),
    # An encoder's graph has an input for slots.
    [("encoder", AutoModelForMaskedLM, ("--peft",)), ("decoder", AutoModelForCausalLM, ("--onnx", "--peft"))],
)
def test_what_only_train_and_eval_run_is_refused_elsewhere(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, model: type, formats: tuple[str, ...]
) -> None:
    prepare_file = ["train", "--backbone", str(folder / kind), "--method", "optiprompt", "--steps", "0"]
    asked = [*prepare_file, "--task", str(folder / f"{kind}.toml"), "--data", str(folder / "data.jsonl")]
    assert run([*asked, "-o", str(tmp_path / "made")]) == 0
    for format_ in formats:
        more = ["--backbone", str(folder / kind), "-o", str(tmp_path / "out")]
        capfd.readouterr()
        assert run(["export", str(tmp_path / "made"), format_, *more]) == 2
        assert "expected" in capfd.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
    with pytest.raises(BackboneError, match="found one in slots of the text; `prefixkit train` and `prefixkit eval`"):
        attach(model.from_pretrained(folder / kind), load(tmp_path / "made"))
