"""Configurations: every wrong setting is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixkit.errors import ConfigError
from prefixkit.training.config import TrainConfig, assign, from_mapping, read_toml, recorded

LEAST = {"backbone": "model", "data": "train.jsonl", "output": "out.safetensors"}


def test_defaults_are_those_of_the_experiment() -> None:
    config = from_mapping(LEAST)
    assert (config.method.name, config.method.length, config.method.init) == ("prefix-tuning", 16, "text")
    assert (config.batch_size, config.optimizer.loss, config.optimizer.lr) == (16, "mean", None)


def test_sections_come_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('backbone = "m"\ndata = "d"\noutput = "o"\n[method]\nlength = 4\n[optimizer]\nlr = 1\n')
    config = from_mapping(read_toml(path))
    assert config.method.length == 4
    assert config.optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("optimizer.lr=0.5", {"optimizer": {"lr": 0.5}}),
        ("method.init=text:a b", {"method": {"init": "text:a b"}}),
        ("steps = 3", {"steps": 3}),
    ],
)
def test_set_reads_toml_values(assignment: str, expected: dict[str, Any]) -> None:
    settings: dict[str, Any] = {}
    assign(settings, assignment)
    assert settings == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"method": {"name": "prefix-tunning"}}, "did you mean 'prefix-tuning'"),
        ({"method": {"lenght": 3}}, "did you mean 'length'"),
        ({"method": {"length": 0}}, "--length: expected at least 1; found 0"),
        ({"method": {"length": "long"}}, "expected a whole number; found 'long'"),
        ({"steps": -1}, "--steps: expected at least 0; found -1"),
        ({"steps": 1, "epochs": 1}, "either --steps or --epochs"),
        ({"epochs": float("nan")}, "--epochs: expected a positive number"),
        ({"optimizer": {"lr": -1.0}}, "--lr: expected a positive number, at most 1e\\+06; found -1"),
        ({"optimizer": {"loss": "men"}}, "expected mean or sum; found 'men'; did you mean 'mean'"),
        ({"device": "gpu"}, "device: expected auto or cpu or cuda; found 'gpu'"),
        ({"steps": True}, "expected a whole number; found True"),
        ({"method": 3}, "expected a section of settings; found 3"),
        ({"seed": 2**53}, "--seed: expected at most 9007199254740991"),
        ({"optimizer": {"lr": 1e38}}, "--lr: expected a positive number"),
        ({"optimizer": {"max_grad_norm": 0}}, "max_grad_norm: expected a positive number"),
        ({"optimizer": {"max_grad_norm": float("nan")}}, "max_grad_norm: expected a positive number"),
        ({"optimizer": {"weight_decay": -1}}, "weight_decay: expected from 0"),
        ({"epochs": 1e308}, "--epochs: expected a positive number"),
        ({"method": {"name": "prompt-tuning", "positions": "none"}}, "expected a known setting; found 'positions'"),
        ({"method": {"name": "p-tuning", "encoder": "lsm"}}, "expected lstm or mlp; found 'lsm'; did you mean 'lstm'"),
        ({"optimizer": {"name": "adam"}}, "expected adamw or adafactor; found 'adam'; did you mean 'adamw'"),
        ({"optimizer": {"schedule": "cosine"}}, "schedule: expected linear or constant; found 'cosine'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({**LEAST, **settings})


def test_records_made_in_python_are_checked_too() -> None:
    config = TrainConfig(backbone=Path("m"), data=Path("d"), output=Path("o"), epochs=2)  # type: ignore[arg-type]
    assert (config.backbone, config.data, config.output, config.epochs) == ("m", "d", "o", 2.0)
    with pytest.raises(ConfigError, match=r"steps: expected a whole number; found 2\.5"):
        TrainConfig(backbone="m", data="d", output="o", steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="optimizer: expected a section of name, schedule, lr"):
        TrainConfig(backbone="m", data="d", output="o", optimizer={"lr": 1})  # type: ignore[arg-type]


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="expected --data; found none"):
        from_mapping({"backbone": "m", "output": "o"})


@pytest.mark.parametrize("assignment", ["lr", "=3", "steps.a=1"])
def test_wrong_assignments_are_named(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        assign({"steps": 3}, assignment)


def test_provenance_holds_no_path() -> None:
    for method in ({"init": "prefix:/home/me/p"}, {"name": "prompt-tuning", "init": "npy:/home/me/p.npy"}):
        kept = recorded(from_mapping({**LEAST, "task": "/home/me/task.toml", "method": method}))
        assert "/" not in str(kept)
        assert (kept["task"], kept["method"]["init"]) == ("task", method["init"].partition(":")[0])
