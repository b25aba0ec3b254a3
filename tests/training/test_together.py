"""Several tasks with one prefix: shared, then each on its own, and every file says where it comes from."""

from __future__ import annotations

import json
import signal
import tomllib
from pathlib import Path

import numpy as np
import pytest

from prefixkit.cli import run
from prefixkit.injections import Combined, KeyValuePrefix, injection
from prefixkit.prefix import load
from prefixkit.training.progress import Silence, Step
from prefixkit.training.together import runs_from, train_together
from tests.encoders import encoder_folder

WORDS = ["the", "blue", "spice", "river", "eagle", "mill", "pub"]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A run of two tasks on a tiny BERT: which words are names, and which sentence is about a pub."""
    tags = [
        {"tokens": [WORDS[i % 7], "is", WORDS[i % 5]], "tags": ["B-x" if i % 7 < 3 else "O", "O", "O"]}
        for i in range(24)
    ]
    labels = [{"text": f"{WORDS[i % 7]} near {WORDS[i % 3]}", "label": "ab"[i % 7 < 3]} for i in range(48)]
    for name, rows in (("tags", tags), ("labels", labels)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
backbone = "{encoder_folder("bert", tmp_path / "bert")}"
output = "{tmp_path / "shared"}"
steps = 12
batch_size = 8
[method]
name = "p-tuning-v2"
length = 4
[[tasks]]
task = "tagging"
data = "{tmp_path / "tags.jsonl"}"
output = "{tmp_path / "tagging"}"
[[tasks]]
task = "classification"
data = "{tmp_path / "labels.jsonl"}"
output = "{tmp_path / "classification"}"
steps = 5
"""
    )
    return path


def test_one_shared_prefix_and_a_file_a_task(settings: Path, tmp_path: Path) -> None:
    assert run(["train", "--config", str(settings)]) == 0
    shared, tagging, classification = (load(tmp_path / name) for name in ("shared", "tagging", "classification"))
    assert isinstance(injection(shared), KeyValuePrefix)
    for own, outputs in ((tagging, 2), (classification, 2)):
        assert isinstance(injection(own), Combined)
        assert own.manifest.provenance.parents == (shared.manifest.content,)
        assert own.tensors["head.weight"].shape == (outputs, 64)
    key = "encoder.self.layers.0.key"
    # No steps of its own: the shared prefix, and the head that was trained with it.
    assert np.array_equal(tagging.tensors[key], shared.tensors[key])
    assert not np.allclose(tagging.tensors["head.bias"], 0)
    assert not np.array_equal(classification.tensors[key], shared.tensors[key])
    assert tagging.manifest.task is not None
    assert (tagging.manifest.task.answer, tagging.manifest.task.labels) == ("tags", ("O", "B-x"))


def test_the_shared_prefix_learns_from_every_task(
    settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def losses(steps: int) -> list[float]:
        assert run(["train", "--config", str(settings), "--steps", str(steps), "--lr", "0.1"]) == 0
        found = []
        for name, file in (("tagging", "tags"), ("classification", "labels")):
            asked = ["--backbone", str(tmp_path / "bert"), "--data", str(tmp_path / f"{file}.jsonl"), "--json"]
            capfd.readouterr()
            assert run(["eval", str(tmp_path / name), *asked]) == 0
            found.append(json.loads(capfd.readouterr().out)["metrics"]["loss"])
        return found

    settings.write_text(settings.read_text().replace("steps = 5\n", ""))
    before, after = losses(1), losses(150)
    assert all(late < early - 0.02 for early, late in zip(before, after, strict=True)), (before, after)


class Ends(Silence):
    """Asks to end in the last step of the first task's own training."""

    def on_step(self, step: Step) -> None:
        if step.step == step.total == 3:
            signal.raise_signal(signal.SIGINT)


def test_a_signal_in_the_last_step_of_a_task_ends_behind_it(settings: Path, tmp_path: Path) -> None:
    own = settings.read_text().replace(
        f'output = "{tmp_path / "tagging"}"', f'output = "{tmp_path / "tagging"}"\nsteps = 3'
    )
    with pytest.raises(KeyboardInterrupt):
        train_together(*runs_from(tomllib.loads(own), "run.toml"), listener=Ends())
    assert load(tmp_path / "tagging").manifest.provenance.metrics["steps"] == 3
    assert not (tmp_path / "classification").exists()


def test_what_cannot_be_shared_is_refused(settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = settings.read_text()
    for wrong, told in (
        (text.replace('output = "' + str(tmp_path / "tagging"), 'output = "' + str(tmp_path / "shared")), "of its own"),
        (text.replace("p-tuning-v2", "linear-probe").replace("length = 4", ""), "a method to share, and heads"),
        (text.partition('[[tasks]]\ntask = "classification"')[0], "two [[tasks]] or more, each with its data; found 1"),
        (text.replace('output = "' + str(tmp_path / "tagging"), f'output = "{tmp_path}/./shared'), "of its own"),
        (
            text.replace(f'output = "{tmp_path / "shared"}"', f'output = "{tmp_path / "tags.jsonl"}"'),
            "an input of this",
        ),
        (text.replace(f'output = "{tmp_path / "tagging"}"', f'output = "{tmp_path / "labels.jsonl"}"'), "an input of"),
        (text.replace(f'output = "{tmp_path / "shared"}"', 'output = "/nowhere/shared"'), "found no /nowhere"),
        (text.partition("[[tasks]]")[0].replace("steps = 12", "tasks = 3"), "[[tasks]]: expected a list of tables"),
    ):
        settings.write_text(wrong)
        assert run(["train", "--config", str(settings)]) == 2
        assert told in capfd.readouterr().err
    assert not list(tmp_path.glob("shared*"))
    assert json.loads((tmp_path / "tags.jsonl").read_text().splitlines()[0])["tags"]
