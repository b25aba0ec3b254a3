"""What stands in the way of assembling the page is said, and nothing half-written stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.web.build import assemble, main
from prefixkit.errors import ConfigError, InputError


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"onnxruntime-web/dist/ort\.wasm.*no such file; npm install"):
        assemble(tmp_path / "node_modules", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path, node_modules: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="expected an empty folder or a new one; found other files in it"):
        assemble(node_modules, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_an_interruption_leaves_nothing_and_is_told_in_one_line(
    tmp_path: Path, node_modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixkit.export_onnx", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([str(node_modules), str(tmp_path / "page")])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
