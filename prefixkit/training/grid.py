"""Every combination of some settings: the runs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

from prefixkit.errors import ConfigError
from prefixkit.training.config import OF_THE_MACHINE, TrainConfig, from_mapping, override, toml_value

SHARED = (*sorted(OF_THE_MACHINE - {"data", "eval_data"}), "dtype", "quantize")
"""What all runs of a sweep have in common."""
Point = Mapping[str, Any]
"""One combination: a value for each key, such as `optimizer.lr`."""


def axes(given: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each key, from `KEY=VALUE,VALUE,…` or `KEY=[VALUE, VALUE, …]`.

    Raises:
        ConfigError: no key, no value, one that all runs share, or the same key twice.
    """
    found: dict[str, list[Any]] = {}
    for text in given:
        key, _, values = (part.strip() for part in text.partition("="))
        parsed = toml_value(values) if values.startswith("[") else [toml_value(one) for one in values.split(",")]
        if not key or not values or not isinstance(parsed, list) or not parsed or key in found:
            raise ConfigError("--grid", expected="KEY=VALUE,VALUE such as optimizer.lr=0.03,0.1, once", found=text)
        if key in SHARED:
            raise ConfigError("--grid", expected=f"{key} to be that of all runs", found=text)
        found[key] = parsed
    if not found:
        raise ConfigError("--grid", expected="settings to vary, such as seed=0,1,2", found="none")
    return found


def points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination, the last key varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def configs(settings: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], folder: Path) -> list[TrainConfig]:
    """The run of every combination of `grid` over `settings`, each with an output of its own in `folder`.

    Raises:
        ConfigError: settings that are none, a value twice, or no validation data, by which runs are told apart.
    """
    for key, values in grid.items():
        _refuse_repeated(key, values)
    made = []
    for number, point in enumerate(points(grid)):
        own = deepcopy(dict(settings))
        for key, value in point.items():
            override(own, key, value, "--grid")
        config = from_mapping({**own, "output": str(folder / f"{number:03}.safetensors")}, "sweep")
        if config.eval_data is None:
            raise ConfigError("--eval-data", expected="examples by which the best run is told", found="none")
        made.append(config)
    return made


def _refuse_repeated(key: str, values: Sequence[Any]) -> None:
    """Raise ConfigError for values that are equal: a trial is known by its point."""
    for place, value in enumerate(values):
        if value in values[:place]:
            found = f"{values[values.index(value)]!r} and {value!r}"
            raise ConfigError("--grid", expected=f"values of {key} that differ", found=found)
