"""The key as it is given and as it is shown."""

from __future__ import annotations

import pytest

from prefixkit.errors import ConfigError
from prefixkit.serving.http.key import read_key
from tests.serving.http.client import serving
from tests.serving.scripted_engine import ScriptedEngine


def test_a_key_from_a_file_has_no_end_of_line(engine: ScriptedEngine) -> None:
    with serving(engine, api_key=" open sesame\n") as client:
        assert client.ask("/v1/models", headers={"Authorization": "Bearer open sesame"})[0] == 200
        assert client.refusal("/v1/models", headers={"Authorization": "Bearer open"})[0] == 401


def test_no_key_is_none() -> None:
    assert read_key(None, "--api-key") is None


@pytest.mark.parametrize("given", ["", " \n", "open\nsesame", "sesame\x00"])
def test_keys_that_nobody_can_show_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="--api-key: expected a key") as refused:
        read_key(given, "--api-key")
    assert "sesame" not in str(refused.value)
