"""Choosing labels: against each continuation alone, and through the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.data.readers import Example
from prefixkit.errors import ConfigError, DataError
from prefixkit.prefix import load
from prefixkit.task import encode_prompt, encode_target, load_task, load_tokenizer
from prefixkit.training.classification import chosen, label_scores
from prefixkit.training.metrics.classification import classification_scores
from tests.prefixes import TASK as TASK_RECORD
from tests.ragged import random_prefix

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
TASK = """
input_template = "{text} :"
separator = ""
target_template = " {target}"
max_length = 40
[verbalizer]
1 = "cheap"
0 = "near the river"
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "sentiment.toml"
    path.write_text(TASK)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = [{"text": text, "label": label} for text, label in (("blue mill pub", 1), ("eagle", 0), ("shop food", 1))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return path


@torch.no_grad()
def test_scores_are_those_of_each_continuation_alone(backbone_folder: Folder, task: Path) -> None:
    backbone = load_backbone(backbone_folder("gpt2"))
    tokenizer = load_tokenizer(backbone.folder)
    record = load_task(task, tokenizer, max_length=64)
    assert record.labels == ("1", "0")
    prefix = random_prefix(backbone.model)
    examples = [Example({"text": text}, "cheap") for text in ("blue", "the river eagle mill", "pub near city")]
    found = label_scores(backbone, record, tokenizer, examples, prefix, batch_size=4)
    for row, example in enumerate(examples):
        prompt = encode_prompt(record, tokenizer, example.fields)
        for column, word in enumerate(("cheap", "near the river")):
            target = encode_target(record, tokenizer, word)
            logits = torch.log_softmax(backbone.logits(torch.tensor([prompt + target]), None, prefix)[0], -1)
            places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
            alone = sum(logits[place, token].item() for place, token in zip(places, target, strict=True))
            assert found[row, column].item() == pytest.approx(alone, abs=1e-4)
    bare = label_scores(backbone, record, tokenizer, examples, None)
    assert (found - bare).abs().max() > 0.1
    best = [("1", "0")[index] for index in found.argmax(dim=1).tolist()]
    assert chosen(record, [found]) == best


def test_a_prefix_learns_to_choose(backbone_folder: Folder, task: Path, data: Path, tmp_path: Path, capfd: Out) -> None:
    folder, output = str(backbone_folder("gpt2")), str(tmp_path / "p")
    asked = ["train", "--backbone", folder, "--data", str(data), "--task", str(task), "-o", output, "--length", "8"]
    assert run([*asked, "--steps", "150", "--lr", "0.3"]) == 0
    assert load(output).manifest.task.verbalizer == {"1": "cheap", "0": "near the river"}
    capfd.readouterr()
    scoring = [
        "eval",
        output,
        "--backbone",
        folder,
        "--data",
        str(data),
        "--json",
        "-o",
        str(tmp_path / "chosen.jsonl"),
    ]
    assert run([*scoring]) == 0
    trained = json.loads(capfd.readouterr().out)["metrics"]
    assert run([*scoring[:-2], "--no-prefix"]) == 0
    bare = json.loads(capfd.readouterr().out)["metrics"]
    assert set(trained) == {"loss", "accuracy", "macro_f1"}
    assert trained["accuracy"] == 100.0 > bare["accuracy"]
    lines = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert lines[4] == {"text": "eagle", "label": "0", "chosen": "0"}


def test_most_prefixes_decide_and_likelihood_breaks_ties() -> None:
    record = replace(TASK_RECORD, verbalizer={"a": "x", "b": "y", "c": "z"})
    one = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -2.0, -9.0]])
    two = torch.tensor([[-1.0, -2.0, -9.0], [-9.0, -0.1, -9.0]])
    three = torch.tensor([[-9.0, -9.0, -0.1], [-9.0, -9.0, -8.0]])
    assert chosen(record, [one, two, three]) == ["a", "b"]
    assert chosen(record, [one, two]) == ["a", "b"]
    assert chosen(record, [three]) == ["c", "c"]


def test_several_prefixes_choose_together(
    backbone_folder: Folder, task: Path, data: Path, tmp_path: Path, records: Path, capfd: Out
) -> None:
    folder, files = str(backbone_folder("gpt2")), [str(tmp_path / name) for name in ("one", "two", "three")]
    asked = ["train", "--backbone", folder, "--steps", "2", "--length", "4"]
    for seed, file in enumerate(files[:2]):
        labelled = ["--data", str(data), "--task", str(task), "-o", file, "--seed", str(seed)]
        assert run([*asked, *labelled]) == 0
    capfd.readouterr()
    assert run(["eval", *files[:2], "--backbone", folder, "--data", str(data), "--json"]) == 0
    together = json.loads(capfd.readouterr().out)["metrics"]
    alone = []
    for file in files[:2]:
        assert run(["eval", file, "--backbone", folder, "--data", str(data), "--json"]) == 0
        alone.append(json.loads(capfd.readouterr().out)["metrics"]["loss"])
    assert together["loss"] == pytest.approx(sum(alone) / 2)
    assert run([*asked, "--data", str(records), "-o", files[2]]) == 0
    for pair, message in ((files[1:], "expected the task of"), (files[2:] * 2, "one prefix for a task that writes")):
        capfd.readouterr()
        assert run(["eval", *pair, "--backbone", folder, "--data", str(data)]) == 2
        assert message in capfd.readouterr().err


def test_scores_of_choices_by_hand() -> None:
    found = classification_scores(["a", "a", "b", "a"], ["a", "b", "b", "b"], ["a", "b", "c"])
    # a: 1 of 3 chosen right, 1 of 1 found; b: 1 of 1 and 1 of 3; c never occurs.
    assert found == {"accuracy": 50.0, "macro_f1": pytest.approx(100 * (0.5 + 0.5 + 0.0) / 3)}
    with pytest.raises(DataError, match="a choice for every example"):
        classification_scores([], [], ["a"])


def test_an_unknown_label_is_named_with_its_line(
    backbone_folder: Folder, task: Path, tmp_path: Path, capfd: Out
) -> None:
    for label, message in (('"2"', "found '2'"), ("true", "found 'true'"), ("null", "found 'null'")):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {label}}}\n')
        asked = ["train", "--backbone", str(backbone_folder("gpt2")), "--task", str(task)]
        assert run([*asked, "--data", str(tmp_path / "bad.jsonl"), "-o", str(tmp_path / "p")]) == 2
        told = capfd.readouterr().err
        assert "bad.jsonl:2: expected 'label' as one of 1, 0" in told
        assert message in told


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[verbalizer]\na = "x"\n', "two different words at least; found a = 'x'"),
        ('[verbalizer]\na = "x"\nb = "x"\n', "two different words at least"),
        ("[verbalizer]\na = 1\nb = 2\n", "a word for each label"),
        ('verbalizer = "x"\n', "a word for each label; found 'x'"),
    ],
)
def test_verbalizers_that_cannot_tell_labels_apart_are_refused(
    backbone_folder: Folder, tmp_path: Path, table: str, message: str
) -> None:
    (tmp_path / "task.toml").write_text(table)
    with pytest.raises(ConfigError, match=message):
        load_task(tmp_path / "task.toml", load_tokenizer(backbone_folder("gpt2")), max_length=64)
