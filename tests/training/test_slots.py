"""Methods whose prompt stands in slots of a template: trained, scored, refused, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.injections import EmbeddingPrompt, HiddenPrompt, injection, part_of
from prefixkit.prefix import Prefix, load
from prefixkit.task import SLOT_ID, encode_prompt, load_task, load_tokenizer, without_slots
from tests.encoders import encoder_folder

Out = pytest.CaptureFixture[str]
WORDS = ["the", "blue", "spice", "river", "eagle", "mill", "pub"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa, forty examples of two labels, and a cloze with three slots."""
    path = tmp_path_factory.mktemp("cloze")
    encoder_folder("roberta", path / "roberta")
    rows = [{"text": f"{WORDS[i % 7]} near {WORDS[i % 3]}", "label": "ab"[i % 7 < 3]} for i in range(42)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = 'input_template = "{cls}{text}"\nseparator = "{slot} {slot} {mask}{slot}{sep}"\n'
    (path / "cloze.toml").write_text(text + '[verbalizer]\na = "x"\nb = "y"\n')
    return path


def trained(folder: Path, out: Path, method: str, *more: str, steps: int = 40) -> Prefix:
    asked = ["train", "--backbone", str(folder / "roberta"), "--method", method, "--task", str(folder / "cloze.toml")]
    asked += ["--data", str(folder / "data.jsonl"), "-o", str(out), "--steps", str(steps), *more]
    assert run(asked) == 0
    return load(out)


def metrics(folder: Path, file: Path, capfd: Out, *more: str) -> dict[str, float]:
    asked = ["eval", str(file), "--backbone", str(folder / "roberta"), "--data", str(folder / "data.jsonl"), "--json"]
    capfd.readouterr()
    assert run([*asked, *more]) == 0
    found: dict[str, float] = json.loads(capfd.readouterr().out)["metrics"]
    return found


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("p-tuning", ("--lr", "0.01")),
        ("p-tuning", ("--lr", "0.01", "--set", "method.encoder=mlp")),
        ("optiprompt", ("--lr", "0.1")),
        ("optiprompt", ("--lr", "0.1", "--init", "manual: is a pub")),
        ("prompt-tuning", ("--lr", "1")),
        ("soft-prompts", ("--lr", "0.1", "--init", "text: is a")),
        ("autoprompt", ("--init", "mask")),
    ],
)
def test_slots_are_filled_and_score(
    folder: Path, tmp_path: Path, capfd: Out, method: str, more: tuple[str, ...]
) -> None:
    made = trained(folder, tmp_path / "made", method, *more)
    prompt = part_of(injection(made), EmbeddingPrompt)
    assert prompt is not None
    assert (prompt.placement, prompt.length) == ("slots", 3)
    assert run(["inspect", str(tmp_path / "made"), "--backbone", str(folder / "roberta")]) == 0
    with_prompt, bare = (
        metrics(folder, tmp_path / "made", capfd),
        metrics(folder, tmp_path / "made", capfd, "--no-prefix"),
    )
    assert with_prompt["loss"] < bare["loss"] - 0.1


def test_a_soft_prompt_keeps_its_words_and_perturbs_every_layer(folder: Path, tmp_path: Path) -> None:
    made = injection(trained(folder, tmp_path / "made", "soft-prompts", "--init", "text: is a", "--lr", "0.1"))
    words, hidden = part_of(made, EmbeddingPrompt), part_of(made, HiddenPrompt)
    assert words is not None
    assert hidden is not None
    assert words.token_ids is not None
    backbone = load_backbone(folder / "roberta")
    assert torch.equal(words.embeddings, backbone.vocabulary[list(words.token_ids)])
    assert (hidden.mode, hidden.placement, len(hidden.hidden)) == ("add", "slots", 2)
    assert all(rows.abs().max() > 0.01 for rows in hidden.hidden)
    shallow = trained(folder, tmp_path / "less", "soft-prompts", "--init", "text: is a", "--set", "method.depth=1")
    found = part_of(injection(shallow), HiddenPrompt)
    assert found is not None
    assert found.hidden[1].abs().max() == 0


def test_autoprompt_chooses_no_label_word_and_no_special_token(folder: Path, tmp_path: Path) -> None:
    made = part_of(injection(trained(folder, tmp_path / "made", "autoprompt", "--init", "mask")), EmbeddingPrompt)
    assert made is not None
    assert made.token_ids is not None
    tokenizer = load_tokenizer(folder / "roberta")
    mask = tokenizer.named_id("mask_token")
    forbidden = {*tokenizer.encode_text("x"), *tokenizer.encode_text("y"), *tokenizer.special_ids.values()} - {mask}
    assert not forbidden & set(made.token_ids)
    assert set(made.token_ids) != {mask}


def test_the_objective_among_labels_differs_and_is_recorded(folder: Path, tmp_path: Path, capfd: Out) -> None:
    whole = trained(folder, tmp_path / "whole", "p-tuning", steps=10)
    among = trained(folder, tmp_path / "among", "p-tuning", "--set", "objective=labels", steps=10)
    assert among.manifest.provenance.config["objective"] == "labels"
    assert not np.allclose(whole.tensors["prompt.embeddings"], among.tensors["prompt.embeddings"])


def test_slots_behind_the_separator_survive_a_text_that_is_too_long(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "roberta")
    task = load_task(folder / "cloze.toml", tokenizer, max_length=12, kind="encoder")
    ids = encode_prompt(task, tokenizer, {"text": "river " * 40}, where="here")
    assert (len(ids), ids.count(SLOT_ID), ids.count(tokenizer.named_id("mask_token") or 0)) == (12, 3, 1)
    assert SLOT_ID not in encode_prompt(without_slots(task), tokenizer, {"text": "river"}, where="here")


def test_what_cannot_be_is_refused_in_a_line(folder: Path, tmp_path: Path, capfd: Out) -> None:
    base = [
        "train",
        "--backbone",
        str(folder / "roberta"),
        "--data",
        str(folder / "data.jsonl"),
        "-o",
        str(tmp_path / "p"),
    ]
    late, plain = tmp_path / "late.toml", tmp_path / "plain.toml"
    late.write_text('input_template = "{cls}{text}{slot}{mask}"\nmax_length = 4\n[verbalizer]\na = "x"\nb = "y"\n')
    plain.write_text('input_template = "{cls}{text}{mask}"\n[verbalizer]\na = "x"\nb = "y"\n')
    for method, task, told in (
        ("p-tuning-v2", folder / "cloze.toml", "expected a task without slots; found 3"),
        ("optiprompt", plain, "expected a task with slots; found none"),
        ("p-tuning", late, "into the task's separator, which is never cut"),
    ):
        assert run([*base, "--method", method, "--task", str(task)]) == 2
        line = capfd.readouterr().err.strip()
        assert told in line
        assert "\n" not in line
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("method", "lr"), [("prompt-tuning", "1"), ("optiprompt", "0.1"), ("p-tuning", "0.01"), ("prefix-tuning", "0.1")]
)
def test_an_infix_stands_between_input_and_target(
    backbone_folder: Callable[..., Path], records: Path, tmp_path: Path, capfd: Out, method: str, lr: str
) -> None:
    (tmp_path / "infix.toml").write_text('separator = " {slot}{slot}\\n"\n')
    asked = ["--backbone", str(backbone_folder("gpt2")), "--data", str(records)]
    made = ["train", *asked, "--method", method, "--task", str(tmp_path / "infix.toml"), "--lr", lr]
    assert run([*made, "-o", str(tmp_path / "infix"), "--steps", "40"]) == 0
    losses = []
    for more in ([], ["--no-prefix"]):
        capfd.readouterr()
        assert (
            run(["eval", str(tmp_path / "infix"), *asked, "--json", "--limit", "8", "--max-new-tokens", "3", *more])
            == 0
        )
        losses.append(json.loads(capfd.readouterr().out)["metrics"]["loss"])
    assert losses[0] < losses[1] - 0.1


def test_label_words_are_searched(folder: Path, tmp_path: Path, capfd: Out) -> None:
    (tmp_path / "ask.toml").write_text('answer = "label"\ninput_template = "{cls}{text}{mask}"\n')
    asked = ["label-words", "--backbone", str(folder / "roberta"), "--data", str(folder / "data.jsonl")]
    assert run([*asked, "--task", str(tmp_path / "ask.toml"), "--words", "3", "--json"]) == 0
    words = json.loads(capfd.readouterr().out)["words"]
    assert list(words) == ["a", "b"]
    assert all(len(found) == 3 for found in words.values())
    assert not set(words["a"]) & set(words["b"])
    assert run([*asked, "--task", str(folder / "cloze.toml")]) == 2
    assert 'expected a task with answer = "label"' in capfd.readouterr().err


def test_a_length_that_differs_from_the_slots_is_refused(folder: Path, tmp_path: Path, capfd: Out) -> None:
    asked = [
        "train",
        "--backbone",
        str(folder / "roberta"),
        "--method",
        "p-tuning",
        "--task",
        str(folder / "cloze.toml"),
    ]
    asked += ["--data", str(folder / "data.jsonl"), "-o", str(tmp_path / "x.safetensors"), "--steps", "1"]
    assert run([*asked, "--length", "3"]) == 0
    capfd.readouterr()
    assert run([*asked, "--length", "5"]) == 2
    assert "expected 3, a vector a slot; found 5" in capfd.readouterr().err
