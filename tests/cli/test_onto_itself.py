"""No command writes over what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixkit.cli.onto_itself import refuse_own_input
from prefixkit.errors import ConfigError


def test_an_input_is_no_output_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "own").touch()
    (tmp_path / "link").symlink_to("own")
    monkeypatch.chdir(tmp_path)
    other = Path("other")
    for output in (Path("own"), Path("folder/../own"), Path("link"), tmp_path / "own"):
        with pytest.raises(ConfigError) as caught:
            refuse_own_input(output, [other, Path("own")], "cast")
        assert str(caught.value).startswith(f"cast: {output}: expected an output beside the inputs; found one of the")
        refuse_own_input(output, [other, Path("folder/own")], "cast")
