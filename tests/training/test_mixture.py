"""Mixtures of prompts: EM as brute force has it, one file a pattern, and scores of them all together."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from prefixkit.cli import run
from prefixkit.prefix import load
from prefixkit.training import loop
from prefixkit.training.config import TrainConfig, read_toml
from prefixkit.training.mixture import _joint, _prepared, patterns_from, train_mixture
from tests.encoders import encoder_folder
from tests.training.test_loop import Interrupted

WORDS = ["the", "blue", "spice", "river", "eagle", "mill", "pub"]
TEMPLATES = ("{cls}{text} is {mask}", "{cls}{mask} : {text}", "{cls}a {mask} near {text}")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Three patterns of one question, on a tiny BERT."""
    rows = [{"text": f"{WORDS[i % 7]} near {WORDS[i % 3]}", "label": "ab"[i % 7 < 3]} for i in range(42)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = encoder_folder("bert", tmp_path / "bert")
    text = f"""
backbone = "{folder}"
data = "{tmp_path / "data.jsonl"}"
steps = 30
batch_size = 8
[method]
name = "p-tuning-v2"
length = 3
[optimizer]
lr = 0.1
"""
    for index, template in enumerate(TEMPLATES):
        task = tmp_path / f"pattern{index}.toml"
        task.write_text(f'input_template = "{template}"\n[verbalizer]\na = "x"\nb = "y"\n')
        text += f'[[patterns]]\ntask = "{task}"\noutput = "{tmp_path / f"made{index}"}"\n'
    (tmp_path / "run.toml").write_text(text)
    return tmp_path / "run.toml"


def configs(run_file: Path) -> list[TrainConfig]:
    return patterns_from(read_toml(run_file), "run.toml")


def test_weights_sum_to_one_and_each_file_has_its_own(run_file: Path, tmp_path: Path) -> None:
    assert run(["train", "--config", str(run_file)]) == 0
    made = [load(tmp_path / f"made{index}") for index in range(3)]
    weights = [prefix.manifest.provenance.metrics["mixture_weight"] for prefix in made]
    assert sum(weights) == pytest.approx(1.0)
    assert len(set(weights)) == 3
    templates = [prefix.manifest.task.input_template for prefix in made if prefix.manifest.task is not None]
    assert len(set(templates)) == 3
    key = "encoder.self.layers.0.key"
    assert not np.allclose(made[0].tensors[key], made[1].tensors[key])


def test_a_mixture_of_one_is_a_run_of_its_own(run_file: Path, tmp_path: Path) -> None:
    first = configs(run_file)[0]
    alone = loop.train(replace(first, output=str(tmp_path / "alone")))
    (mixed,) = train_mixture([first])
    assert mixed.manifest.provenance.metrics["mixture_weight"] == 1.0
    for name, array in alone.tensors.items():
        assert np.allclose(array, mixed.tensors[name], atol=1e-5)


def test_em_with_frozen_prompts_never_lowers_the_likelihood(run_file: Path) -> None:
    still = [
        replace(one, steps=60, optimizer=replace(one.optimizer, lr=1e-12, schedule="constant"))
        for one in configs(run_file)
    ]
    heard = Interrupted()
    losses: list[float] = []
    heard.on_step = lambda step: losses.append(step.loss)  # type: ignore[method-assign]
    train_mixture(still, heard)
    # 42 examples in batches of 8: the last batch of an epoch is of 2.
    sizes = [len(_prepared(still[:1])[0].batches.indices(step)) for step in range(60)]
    epochs = [np.average(losses[begin : begin + 6], weights=sizes[begin : begin + 6]) for begin in range(0, 60, 6)]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(epochs))
    assert epochs[-1] < epochs[0] - 1e-4


def test_responsibilities_are_those_of_brute_force(run_file: Path) -> None:
    prepared = _prepared(configs(run_file))
    weights = torch.tensor([0.5, 0.3, 0.2])
    with torch.no_grad():
        found = torch.softmax(_joint(prepared, [0, 5], weights), dim=1)
        for row, index in enumerate((0, 5)):
            shares = []
            for one, weight in zip(prepared, weights.tolist(), strict=True):
                batch = one.batches.collate([one.batches.examples[index]])
                logits = one.backbone.target_logits(batch.input_ids, batch.attention_mask, batch.labels, one.method())
                word = batch.labels[batch.labels != -100]
                shares.append(weight * torch.softmax(logits, dim=-1)[0, word].item())
            brute = torch.tensor(shares) / sum(shares)
            assert torch.allclose(found[row], brute, atol=1e-5)


def test_the_mixture_is_scored_as_one(run_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--config", str(run_file), "--steps", "150"]) == 0
    files = [str(tmp_path / f"made{index}") for index in range(3)]
    asked = ["--backbone", str(tmp_path / "bert"), "--data", str(tmp_path / "data.jsonl"), "--json"]
    capfd.readouterr()
    assert run(["eval", *files, *asked, "--mixture"]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["accuracy"] > 60
    assert run(["eval", *files, *asked]) == 2
    assert "expected the task of" in capfd.readouterr().err
    alone = loop.train(replace(configs(run_file)[0], steps=1, output=str(tmp_path / "alone")))
    assert alone.manifest.content
    assert run(["eval", str(tmp_path / "alone"), *asked, "--mixture"]) == 2
    assert "train them together with [[patterns]]" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "right", "told"),
    [
        ("made1", "./made0", "an output of its own for each file"),
        ("made1", "data.jsonl", "found an input of this run"),
        ('[method]\nname = "p-tuning-v2"\nlength = 3', 'method = "p-tuning-v2"', "expected a section [method]"),
        ("pattern2.toml", "other.toml", "pattern0.toml: a, b; found a, c"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_any_work(
    run_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], wrong: str, right: str, told: str
) -> None:
    (tmp_path / "other.toml").write_text(f'input_template = "{TEMPLATES[0]}"\n[verbalizer]\na = "x"\nc = "y"\n')
    text = run_file.read_text().replace('"label": "b"', '"label": "a"')
    run_file.write_text(text.replace(wrong, right))
    rows = [{"text": "the mill", "label": "a"}] * 8
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(["train", "--config", str(run_file)]) == 2
    assert told in capfd.readouterr().err
    assert not list(tmp_path.glob("made*"))


def test_a_mixture_without_its_prompts_is_none(
    run_file: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["train", "--config", str(run_file), "--steps", "1"]) == 0
    files = [str(tmp_path / f"made{index}") for index in range(3)]
    asked = ["--backbone", str(tmp_path / "bert"), "--data", str(tmp_path / "data.jsonl"), "--mixture"]
    assert run(["eval", *files, *asked, "--no-prefix"]) == 2
    assert "--no-prefix: expected one without --mixture" in capfd.readouterr().err


def test_words_without_a_verbalizer_are_ranked(
    run_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "open.toml").write_text('input_template = "{cls}{input} is {mask}"\n')
    rows = [{"input": f"{WORDS[i % 7]} near", "target": "xy"[i % 2]} for i in range(20)]
    (tmp_path / "open.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = replace(
        configs(run_file)[0], task=str(tmp_path / "open.toml"), data=str(tmp_path / "open.jsonl"), steps=40,
        output=str(tmp_path / "open"),
    )  # fmt: skip
    loop.train(config)
    asked = ["--backbone", str(tmp_path / "bert"), "--data", str(tmp_path / "open.jsonl"), "--json"]
    assert run(["eval", str(tmp_path / "open"), *asked, "--output", str(tmp_path / "ranks")]) == 0
    metrics = json.loads(capfd.readouterr().out)["metrics"]
    places = [json.loads(line)["rank"] for line in (tmp_path / "ranks").read_text().splitlines()]
    assert metrics["mrr"] == pytest.approx(sum(1 / place for place in places) / 20)
    assert metrics["p_at_10"] == 100.0
    assert run(["eval", str(tmp_path / "open"), *asked, "--no-prefix"]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"]["mrr"] < metrics["mrr"] / 2
