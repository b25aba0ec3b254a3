"""The public surface: what `import prefixkit` offers, and what it costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import prefixkit


def test_dir_is_all_and_everything_in_it_can_be_had() -> None:
    assert dir(prefixkit) == sorted(prefixkit.__all__)
    for name in prefixkit.__all__:
        assert getattr(prefixkit, name).__doc__, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = prefixkit.trian


def test_import_brings_nothing_heavy() -> None:
    code = "import prefixkit, sys; print(*{'torch', 'transformers', 'numpy', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_an_installation_without_extras_has_no_other_runtime() -> None:
    """Bridges need their runtimes where these run, and nowhere else."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed, extras = project["dependencies"], project["optional-dependencies"]
    named = {name: {_package(line) for line in lines} for name, lines in extras.items() if name != "test"}
    assert {"mlx-lm", "openvino", "llama-cpp-python", "ray"} <= set().union(*named.values())
    assert {_package(line) for line in needed} & (set().union(*named.values()) | {"peft"}) == set()


def _package(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return found[0]
