"""Every answer of a head through the command line: trained, inspected, scored, and worse without what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixkit.cli import run
from prefixkit.prefix import load
from tests.architectures import tiny
from tests.encoders import encoder_folder
from tests.small_tokenizer import END, write_folder

Out = pytest.CaptureFixture[str]
WORDS = ["blue", "spice", "mill", "eagle", "river", "city", "pub", "shop", "food", "cheap"]


def _label(index: int) -> dict[str, Any]:
    return {"text": f"{WORDS[index % 10]} {WORDS[index % 7]}", "label": int(index % 10 > 4)}


def _pair(index: int) -> dict[str, Any]:
    return {"text_a": WORDS[index % 10], "text_b": WORDS[index % 7], "label": ["no", "yes"][index % 10 > 4]}


def _tags(index: int) -> dict[str, Any]:
    words = ["the", WORDS[index % 10], "pub", "near", WORDS[index % 7]]
    return {"tokens": words, "tags": ["O", "B-NAME", "I-NAME", "O", "B-PLACE"]}


def _choice(index: int) -> dict[str, Any]:
    choices = ["a pub", "cheap food", "the river"][: 2 + index % 2]
    return {"text": f"{WORDS[index % 10]} is", "choices": choices[::-1], "label": choices[::-1].index("cheap food")}


def _span(index: int) -> dict[str, Any]:
    name, place = WORDS[index % 10], WORDS[index % 7]
    context = f"the {name} is near {place} ."
    answer = {"text": place, "start": context.rindex(place)}
    return {"question": "where ?", "context": context, "answer": [answer, answer] if index % 2 else answer}


TASKS: dict[str, tuple[Callable[[int], dict[str, Any]], set[str]]] = {
    "classification": (_label, {"accuracy", "macro_f1"}),
    "pair-classification": (_pair, {"accuracy", "macro_f1"}),
    "tagging": (_tags, {"f1", "precision", "recall", "accuracy"}),
    "multiple-choice": (_choice, {"accuracy"}),
    "question-answering": (_span, {"f1", "exact_match"}),
}


def backbone(name: str, path: Path) -> str:
    if name == "bert":
        return str(encoder_folder("bert", path))
    tiny("gpt2").save_pretrained(path)
    return str(write_folder(path, tokenizer_config={"bos_token": END, "eos_token": END}))


def evaluated(capfd: Out, *asked: str) -> dict[str, float]:
    capfd.readouterr()
    assert run(["eval", *asked, "--json"]) == 0
    metrics: dict[str, float] = json.loads(capfd.readouterr().out)["metrics"]
    return metrics


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_head_and_its_prefix_learn_a_task(name: str, task: str, tmp_path: Path, capfd: Out) -> None:
    folder, (make, metrics) = backbone(name, tmp_path / name), TASKS[task]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(make(index)) + "\n" for index in range(24)))
    asked = ["--backbone", folder, "--data", str(data), "--task", task, "--method", "p-tuning-v2", "--length", "4"]
    files = {steps: str(tmp_path / f"p{steps}") for steps in ("0", "30")}
    for steps, file in files.items():
        assert run(["train", *asked, "--steps", steps, "-o", file]) == 0
    assert run(["inspect", files["30"], "--backbone", folder]) == 0
    assert f"task {task}" in capfd.readouterr().out
    scoring = ["--backbone", folder, "--data", str(data)]
    before = evaluated(capfd, files["0"], *scoring)
    after = evaluated(capfd, files["30"], *scoring, "-o", str(tmp_path / "chosen.jsonl"))
    bare = evaluated(capfd, files["30"], *scoring, "--no-prefix")
    assert set(after) == {"loss", *metrics}
    assert after["loss"] < 0.9 * before["loss"]
    assert after["loss"] < 0.99 * bare["loss"]
    main = "f1" if "f1" in metrics else "accuracy"
    assert after[main] >= bare[main]
    records = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert [record["where"] for record in records] == [f"{data}:{line}" for line in range(1, 25)]
    assert all(set(record) == {"where", "answer", "chosen"} for record in records)


def test_an_answer_that_does_not_fit_is_told(tmp_path: Path, capfd: Out) -> None:
    folder = backbone("bert", tmp_path / "bert")
    long = {"question": "where ?", "context": "near " * 60 + "city", "answer": {"text": "city", "start": 300}}
    (tmp_path / "d.jsonl").write_text(json.dumps(_span(0)) + "\n" + json.dumps(long) + "\n")
    asked = ["train", "--backbone", folder, "--data", str(tmp_path / "d.jsonl"), "--task", "question-answering"]
    assert run([*asked, "--method", "linear-probe", "--steps", "1", "-o", str(tmp_path / "p")]) == 0
    assert "1 of 2 training examples lost the end of their input to fit" in capfd.readouterr().err


def test_a_faulty_line_stops_before_training(tmp_path: Path, capfd: Out) -> None:
    folder = backbone("bert", tmp_path / "bert")
    (tmp_path / "d.jsonl").write_text(json.dumps(_span(0)) + '\n{"question": "q", "context": "c", "answer": "c"}\n')
    asked = ["train", "--backbone", folder, "--data", str(tmp_path / "d.jsonl"), "--task", "question-answering"]
    assert run([*asked, "--method", "p-tuning-v2", "-o", str(tmp_path / "p")]) == 2
    assert f"{tmp_path / 'd.jsonl'}:2: expected 'answer' as" in capfd.readouterr().err
    assert not (tmp_path / "p").exists()


def test_images_in_folders(tmp_path: Path, capfd: Out) -> None:
    from PIL import Image

    folder, random = str(encoder_folder("vit", tmp_path / "vit")), np.random.default_rng(0)
    for index in range(16):
        kind = tmp_path / "images" / ["dark", "light"][index % 2]
        kind.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 100, (12, 20, 3)) + 150 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(kind / f"{index}.png")
    asked = ["--backbone", folder, "--data", str(tmp_path / "images")]
    trained = [
        "train",
        *asked,
        "--task",
        "images",
        "--method",
        "visual-prompt-tuning",
        "--length",
        "2",
        "--steps",
        "10",
    ]
    assert run([*trained, "-o", str(tmp_path / "p")]) == 0
    found = load(tmp_path / "p").manifest.task
    assert found is not None
    assert found.labels == ("dark", "light")
    assert evaluated(capfd, str(tmp_path / "p"), *asked)["accuracy"] == 100.0


def validated(tmp_path: Path, *more: str) -> dict[str, float]:
    folder, data = tmp_path / "gpt2", tmp_path / "d.jsonl"
    if not folder.exists():
        backbone("gpt2", folder)
        # Too much for a short prefix: the loss goes on falling where F1 does not.
        data.write_text("".join(json.dumps(_span(3 * index)) + "\n" for index in range(24)))
    asked = ["train", "--backbone", str(folder), "--data", str(data), "--eval-data", str(data), "--length", "4"]
    asked += ["--task", "question-answering", "--method", "p-tuning-v2", "--steps", "20", "-o", str(tmp_path / "p")]
    assert run([*asked, *more]) == 0
    return dict(load(tmp_path / "p").manifest.provenance.metrics)


def test_the_best_validation_may_be_that_of_the_score(tmp_path: Path, capfd: Out) -> None:
    every = ["--set", "evaluation.every=1"]
    by_loss = validated(tmp_path, *every)
    by_score = validated(tmp_path, *every, "--set", "evaluation.metric=score")
    told = [line for line in capfd.readouterr().err.splitlines() if ", score " in line]
    scores = [float(line.partition(", score ")[2].split()[0]) for line in told]
    losses = [float(line.partition("validation loss ")[2].split(",")[0]) for line in told]
    assert len(scores) == 20
    ranked = [(-score, loss) for score, loss in zip(scores, losses, strict=True)]
    best = ranked.index(min(ranked))
    assert by_score["steps"] == best + 1
    assert by_score["validation_score"] == pytest.approx(scores[best], abs=0.01)
    assert by_score["validation_loss"] == pytest.approx(losses[best], abs=1e-4)
    assert "validation_score" not in by_loss
    assert by_loss["steps"] == losses.index(min(losses)) + 1
    assert by_loss["steps"] != by_score["steps"]
    config: Any = load(tmp_path / "p").manifest.provenance.config
    assert config["evaluation"]["metric"] == "score"
    scored = evaluated(
        capfd, str(tmp_path / "p"), "--backbone", str(tmp_path / "gpt2"), "--data", str(tmp_path / "d.jsonl")
    )
    assert scored["f1"] == pytest.approx(by_score["validation_score"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--set", "evaluation.metric=f1"], "evaluation.metric"),
        (["--set", "evaluation.metric=score"], "expected a head's answers to score; found no --eval-data; use loss"),
    ],
)
def test_a_score_that_cannot_be_had_is_refused(asked: list[str], message: str, tmp_path: Path, capfd: Out) -> None:
    folder = backbone("bert", tmp_path / "bert")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(_label(index)) + "\n" for index in range(8)))
    trained = ["train", "--backbone", folder, "--data", str(tmp_path / "d.jsonl"), "--task", "classification"]
    assert run([*trained, "--method", "p-tuning-v2", "-o", str(tmp_path / "p"), *asked]) == 2
    assert message in capfd.readouterr().err


def test_a_score_of_texts_is_refused(tmp_path: Path, records: Path, capfd: Out) -> None:
    folder = backbone("gpt2", tmp_path / "gpt2")
    asked = ["train", "--backbone", folder, "--data", str(records), "--eval-data", str(records)]
    assert run([*asked, "-o", str(tmp_path / "p"), "--set", "evaluation.metric=score"]) == 2
    assert "found a task answered in words; use loss" in capfd.readouterr().err
