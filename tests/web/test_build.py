"""What stands in the way of assembling the page is said before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.web.build import assemble
from prefixkit.errors import ConfigError


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"onnxruntime-web/dist/ort\.wasm.*no such file; npm install"):
        assemble(tmp_path / "node_modules", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path, node_modules: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="a new folder"):
        assemble(node_modules, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
