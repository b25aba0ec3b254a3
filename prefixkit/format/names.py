"""The names of tensors in a prefix file: built here, and understood here.

    STACK.ATTENTION.layers.I.key|value      [kv_heads, prefix, key_dim | value_dim]
    prompt.embeddings                       [prefix, hidden]
    STACK.layers.I.hidden                   [prefix, hidden]
    delta.NAME                              the shape of the parameter NAME
    head.weight|bias                        [labels, hidden], [labels]

STACK.ATTENTION is `decoder.self`, `encoder.self` or `decoder.cross`; STACK is `decoder` or `encoder`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STACKS = ("decoder", "encoder")
ATTENTIONS = (("decoder", "self"), ("encoder", "self"), ("decoder", "cross"))
PROMPT = "prompt.embeddings"
HEAD_WEIGHT = "head.weight"
HEAD_BIAS = "head.bias"

_LAYER = r"(?P<layer>0|[1-9][0-9]{0,5})"
_GRAMMAR = (
    (
        "key_value_prefix",
        rf"(?P<stack>decoder|encoder)\.(?P<attention>self|cross)\.layers\.{_LAYER}\.(?P<role>key|value)",
    ),
    ("embedding_prompt", r"prompt\.(?P<role>embeddings)"),
    ("hidden_prompt", rf"(?P<stack>decoder|encoder)\.layers\.{_LAYER}\.(?P<role>hidden)"),
    ("parameter_delta", r"delta\.(?P<parameter>.+)"),
    ("task_head", r"head\.(?P<role>weight|bias)"),
)


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """What a tensor's name says. `kind` is the injection that it belongs to; parts that a kind has not are None."""

    kind: str
    stack: str | None = None
    attention: str | None = None
    layer: int | None = None
    role: str | None = None
    parameter: str | None = None


def key(stack: str, attention: str, layer: int) -> str:
    """The name of one layer's keys."""
    return f"{stack}.{attention}.layers.{layer}.key"


def value(stack: str, attention: str, layer: int) -> str:
    """The name of one layer's values."""
    return f"{stack}.{attention}.layers.{layer}.value"


def hidden(stack: str, layer: int) -> str:
    """The name of one layer's hidden prompt."""
    return f"{stack}.layers.{layer}.hidden"


def delta(parameter: str) -> str:
    """The name of the change of one backbone parameter."""
    return f"delta.{parameter}"


def parse(name: str) -> TensorName | None:
    """What `name` says, or None where it is no name of this format."""
    for kind, pattern in _GRAMMAR:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        parts = match.groupdict()
        if "attention" in parts and (parts["stack"], parts["attention"]) not in ATTENTIONS:
            return None
        layer = int(parts.pop("layer")) if "layer" in parts else None
        return TensorName(kind=kind, layer=layer, **parts)
    return None
