"""A run in two processes that torchrun starts is the run of one: equal losses, equal parameters, one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.errors import ConfigError
from prefixkit.training import loop
from prefixkit.training.preparation import prepare
from prefixkit.training.processes import Group
from prefixkit.training.replicas import replicated
from tests.conftest import WORDS
from tests.training.several import outcome
from tests.training.test_loop import settings

Folder = Callable[..., Path]
Outcomes = dict[str, dict[str, Any]]
MLP = {"length": 4, "reparameterization": "mlp", "init": "random"}
# A batch of one leaves a process without examples; five are shared unequally, and their targets are, too.
CASES: dict[str, dict[str, Any]] = {
    "double": {"double": True},
    "single": {},
    "mlp": {"method": MLP, "double": True},
    "sum": {"loss": "sum", "double": True},
    "small batch": {"batch_size": 1, "double": True},
    # Its norms work in float32, and round a sum of gradients otherwise than its parts: padded rows share nothing.
    "llama": {"family": "llama", "layout": "padded", "double": True},
    "packed": {"layout": "packed", "double": True},
    "sharded": {"shard": True, "double": True},
    "sharded llama": {"shard": True, "family": "llama", "layout": "padded", "double": True},
    "sharded small batch": {"shard": True, "batch_size": 1, "double": True},
    "sharded prompt": {"shard": True, "method": {"name": "prompt-tuning", "length": 4}, "double": True},
    "head": {"labelled": True, "shard": True},
    "stopped": {"stopped": 5, "double": True},
    "patience": {"patience": 1, "every": 1, "double": True},
    "dropped": {"dropped": True, "double": True},
}
TOLERANCE = {"single": 1e-5, "head": 1e-5}
HOW = ("double", "dropped", "stopped")


def torchrun(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`command` in several processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, "-m", *command], capture_output=True, text=True, env=environment, check=False)


def given(folder: Folder, records: Path, output: Path, name: str) -> dict[str, Any]:
    """The settings of a case."""
    asked = {"batch_size": 5, "steps": 8, **CASES[name]}
    lr = {"lr": 0.1 if "method" not in asked else 0.01, "loss": asked.pop("loss", "mean")}
    evaluation = {"every": asked.pop("every", 4), "patience": asked.pop("patience", 0)}
    if asked.pop("labelled", False):
        records, evaluation["metric"] = labelled(output.parent.parent), "score"
        asked |= {"task": "classification", "method": {"name": "p-tuning-v2", "length": 3}}
    changes = {key: value for key, value in asked.items() if key not in (*HOW, "family")}
    config = settings(
        folder(asked.get("family", "gpt2")), records, output, optimizer=lr, evaluation=evaluation, **changes
    )
    return {key: value for key, value in asdict(config).items() if value is not None}


def labelled(folder: Path) -> Path:
    """Examples for a head; their classes are shared unequally."""
    rows = [{"text": f"{word} near the mill", "label": str(len(word) > 4)} for word in WORDS]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "labelled.jsonl"


@pytest.fixture(scope="module")
def outcomes(backbone_folder: Folder, records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcomes, Path]:
    """Of every case in two processes; and the folder that they wrote to."""
    folder, place = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("cases")
    cases = {}
    for name, case in CASES.items():
        asked = given(backbone_folder, records, folder / f"{name}.safetensors", name)
        cases[name] = {"settings": asked, **{key: case[key] for key in HOW if key in case}}
    (place / "cases.json").write_text(json.dumps(cases))
    done = torchrun("tests.training.several", str(place / "cases.json"), str(place / "results.json"))
    assert done.returncode == 0, done.stderr
    return json.loads((place / "results.json").read_text()), folder


def alone(folder: Folder, records: Path, tmp_path: Path, name: str) -> dict[str, Any]:
    """The outcome of a case in one process."""
    asked = given(folder, records, tmp_path / "one.safetensors", name)
    return outcome({**asked, "shard": False}, double=CASES[name].get("double", False))


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropped"])
def test_two_processes_train_as_one(
    backbone_folder: Folder, records: Path, tmp_path: Path, outcomes: tuple[Outcomes, Path], name: str
) -> None:
    one, two, allowed = alone(backbone_folder, records, tmp_path, name), outcomes[0][name], TOLERANCE.get(name, 1e-10)
    assert two["losses"] == pytest.approx(one["losses"], rel=allowed)
    assert two["validations"] == pytest.approx(one["validations"], rel=allowed)
    assert two["best"] == one["best"]
    for key, values in one["values"].items():
        assert torch.tensor(two["values"][key]).sub(torch.tensor(values)).abs().max() <= max(1e-8, 30 * allowed)


def test_without_the_exchange_of_gradients_the_losses_are_others(
    backbone_folder: Folder, records: Path, tmp_path: Path, outcomes: tuple[Outcomes, Path]
) -> None:
    one, two = alone(backbone_folder, records, tmp_path, "dropped")["losses"], outcomes[0]["dropped"]["losses"]
    assert two[0] == pytest.approx(one[0], rel=1e-10)
    assert two[-1] != pytest.approx(one[-1], rel=1e-5)


def test_a_backbone_that_is_spread_is_half_in_each_process(outcomes: tuple[Outcomes, Path]) -> None:
    found = outcomes[0]
    assert found["sharded"]["weights"] <= 0.51 * found["double"]["weights"]


def test_a_signal_to_one_process_stops_all_of_them_at_one_step(outcomes: tuple[Outcomes, Path]) -> None:
    assert any("stopped at step 6;" in message for message in outcomes[0]["stopped"]["messages"])


def test_one_process_writes_one_file(outcomes: tuple[Outcomes, Path]) -> None:
    assert sorted(path.stem for path in outcomes[1].iterdir()) == sorted(CASES)


def test_tokens_cannot_be_searched_for_in_several_processes(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    config = settings(backbone_folder("gpt2"), records, tmp_path / "p", method={"name": "autoprompt", "length": 3})
    prepared = prepare(config, group=Group(rank=0, size=2))
    with pytest.raises(ConfigError, match="--method autoprompt: expected one process; found 2"):
        replicated(prepared)


def test_deltas_of_weights_are_refused_where_these_are_spread(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    config = settings(backbone_folder("gpt2"), records, tmp_path / "p", method={"name": "bitfit"}, shard=True)
    with pytest.raises(ConfigError, match="shard: expected a method beside the weights; found --method bitfit"):
        prepare(config, group=Group(rank=0, size=2))


def test_a_backbone_cannot_be_spread_over_one_process(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard: expected processes to spread the backbone over; found one"):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", shard=True))
