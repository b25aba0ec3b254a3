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
GIVEN_PREFIX = "prefix."


def prefix_names(layers: int) -> list[str]:
    """The inputs of the graph that places a prefix: key and value of each layer."""
    return [f"{GIVEN_PREFIX}{layer}.{which}" for layer in range(layers) for which in ("key", "value")]
