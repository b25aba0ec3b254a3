"""The names of inputs and outputs of graphs that write into buffers."""

from __future__ import annotations

from prefixkit.serving.report import INPUTS as PORTABLE
from prefixkit.serving.report import OUTPUTS as _OUTPUTS

INPUTS = {
    "input_ids": "input_ids",
    "position_ids": "position_ids",
    "write_index": "write_index",
    "last": "last",
    **{key: name for key, name in PORTABLE.items() if "%d" in name},
}
OUTPUTS = {**_OUTPUTS, "token": "token"}
GIVEN_PREFIX, SHARED_PREFIX = "prefix.", "shared."
SHARED_LENGTH = "shared_length"


def prefix_names(layers: int) -> list[str]:
    """The inputs of the graph that places a prefix: key and value of each layer."""
    return _of_layers(GIVEN_PREFIX, layers)


def shared_names(layers: int) -> list[str]:
    """The inputs of the graph whose rows share a prefix: key and value of each layer."""
    return _of_layers(SHARED_PREFIX, layers)


def _of_layers(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}{layer}.{which}" for layer in range(layers) for which in ("key", "value")]
