"""`torchrun -m prefixkit train`: one file, one voice, and one line where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prefixkit.cli import run
from prefixkit.prefix import load
from tests.cli.test_train import arguments
from tests.training.test_replicas import torchrun

Folder = Callable[..., Path]


def lines(told: str) -> list[str]:
    """What prefixkit says of an error; torchrun's own report is another thing."""
    return [line for line in told.splitlines() if line.startswith("prefixkit: ")]


def test_two_processes_write_what_one_writes(
    backbone_folder: Folder, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two").mkdir()
    one, two = tmp_path / "one.safetensors", tmp_path / "two" / "two.safetensors"
    folder = backbone_folder("gpt2")
    assert run(arguments(folder, records, one, "--eval-data", str(records), "--json")) == 0
    done = torchrun("prefixkit", *arguments(folder, records, two, "--eval-data", str(records), "--json"))
    assert done.returncode == 0, done.stderr
    found, wanted = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5)
    assert [path.name for path in two.parent.iterdir()] == [two.name]
    ours, theirs = load(one), load(two)
    for name, tensor in ours.tensors.items():
        assert np.abs(theirs.tensors[name] - tensor).max() <= 1e-4
    assert theirs.manifest.provenance.config == ours.manifest.provenance.config
    assert done.stderr.count("step 2: validation loss") == 1


def test_an_error_of_one_process_is_told_once_and_ends_all(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    command = arguments(backbone_folder("gpt2"), records, tmp_path / "p", "--steps", "9")
    done = torchrun("tests.cli.one_fails", *command)
    assert done.returncode != 0
    (line,) = lines(done.stderr)
    assert "expected memory for a step of" in line
    assert not (tmp_path / "p").exists()


def test_an_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    done = torchrun("prefixkit", "sweep", "--grid", "seed=0,1", "-o", str(tmp_path / "out"))
    assert done.returncode != 0
    (line,) = lines(done.stderr)
    assert line.startswith("prefixkit: torchrun: expected one process for a sweep; found 2; start it on each machine")


def test_a_wrong_setting_is_told_once(tmp_path: Path) -> None:
    done = torchrun("prefixkit", "train", "--backbone", "x", "--data", "x", "--lr", "0", "-o", str(tmp_path / "p"))
    assert done.returncode != 0
    (line,) = lines(done.stderr)
    assert line.startswith("prefixkit: --lr: expected a positive number")


def test_a_process_that_was_killed_is_told_by_another(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    command = arguments(backbone_folder("gpt2"), records, tmp_path / "p", "--steps", "9")
    done = torchrun("tests.cli.one_is_killed", *command)
    assert done.returncode != 0
    (line,) = lines(done.stderr)
    assert line.startswith(
        "prefixkit: torchrun: expected every process to go on to the end; found one that is there no"
    )
