"""Tensor names: built, understood, and nothing else accepted."""

from __future__ import annotations

import pytest

from prefixkit.format import names
from prefixkit.format.names import TensorName, parse


def test_what_is_built_is_understood() -> None:
    assert parse(names.key("decoder", "self", 3)) == TensorName(
        kind="key_value_prefix", stack="decoder", attention="self", layer=3, role="key"
    )
    assert parse(names.value("decoder", "cross", 10)) == TensorName(
        kind="key_value_prefix", stack="decoder", attention="cross", layer=10, role="value"
    )
    assert parse(names.hidden("encoder", 0)) == TensorName(
        kind="hidden_prompt", stack="encoder", layer=0, role="hidden"
    )
    assert parse(names.PROMPT) == TensorName(kind="embedding_prompt", role="embeddings")
    assert parse(names.delta("layer.0.bias")) == TensorName(kind="parameter_delta", parameter="layer.0.bias")
    assert parse(names.HEAD_WEIGHT) == TensorName(kind="task_head", role="weight")
    assert parse(names.HEAD_BIAS) == TensorName(kind="task_head", role="bias")


def test_the_spelling_is_the_contract() -> None:
    assert names.key("decoder", "self", 3) == "decoder.self.layers.3.key"
    assert names.hidden("encoder", 2) == "encoder.layers.2.hidden"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "decoder.self.layers.03.key",
        "decoder.self.layers.-1.key",
        "decoder.self.layers.3.keys",
        "decoder.self.layers.3.key\n",
        "encoder.cross.layers.0.key",
        "vision.self.layers.0.key",
        "decoder.layers.0.key",
        "decoder.self.layers.٣.key",
        "prompt.embedding",
        "delta.",
        "head.scale",
    ],
)
def test_other_names_are_not(name: str) -> None:
    assert parse(name) is None
