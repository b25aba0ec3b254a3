"""What a manifest must agree on with itself and with its tensors, beyond what a JSON Schema can say.

All functions take a document whose structure is sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prefixkit.format import names
from prefixkit.format.checks import Problem

DTYPES = ("F32", "F16", "BF16")
Shape = tuple[int, ...]


class Described(Protocol):
    """A tensor's dtype (as safetensors calls it) and shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Shape: ...


def consistency(document: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems between the fields of one manifest."""
    places: set[tuple[str | None, ...]] = set()
    for index, record in enumerate(document["injections"]):
        place = (record["kind"], record.get("stack"), record.get("attention"))
        if place in places:
            yield Problem(f"/injections/{index}", f"expected one {record['kind']} for a place; found another")
        places.add(place)
        yield from _injection(f"/injections/{index}", record, document)
    filler = document.get("task", {}).get("filler_id")
    if filler is not None and filler >= document["backbone"]["vocab_size"]:
        yield Problem("/task/filler_id", f"expected a token id of the vocabulary; found {filler}")
    if "image" in document.get("task", {}):
        yield from _image(document["task"]["image"])


def _injection(pointer: str, record: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Problem]:
    backbone = document["backbone"]
    stack, length = record.get("stack"), record.get("length")
    if stack is not None and stack not in backbone["stacks"]:
        yield Problem(f"{pointer}/stack", f"expected a stack with geometry in /backbone/stacks; found {stack!r}")
    if (stack, record.get("attention")) == ("encoder", "cross"):
        yield Problem(f"{pointer}/attention", "expected 'self', as encoders have no cross-attention; found 'cross'")
    if length is not None and record.get("frozen_slots", 0) > length:
        yield Problem(f"{pointer}/frozen_slots", f"expected at most {length} slots; found {record['frozen_slots']}")
    if "positions" in record:
        yield from _positions(f"{pointer}/positions", record["positions"], backbone.get("context_length"))
    if record["kind"] == "embedding_prompt":
        yield from _embedding_prompt(pointer, record, backbone["vocab_size"])
    if record.get("placement") == "slots" and "task" in document:
        marks = sum(document["task"][part].count("{slot}") for part in ("input_template", "separator"))
        if marks != length:
            yield Problem(f"{pointer}/length", f"expected {marks}, one a {{slot}} in the task; found {length}")
    if (record["kind"], record.get("placement")) == ("key_value_prefix", "slots"):
        yield from _infix(pointer, record, document)
    outputs = _outputs(document.get("task", {}))
    if record["kind"] == "task_head" and outputs is not None and record["labels"] != outputs:
        yield Problem(f"{pointer}/labels", f"expected {outputs} as in /task; found {record['labels']}")


def _infix(pointer: str, record: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Problem]:
    if (*document["backbone"]["stacks"], record["attention"]) != ("decoder", "self"):
        yield Problem(f"{pointer}/placement", "expected 'prepend' but for decoder.self of a decoder; found 'slots'")
    if record["positions"]["text_start"] != 0:
        yield Problem(f"{pointer}/positions/text_start", "expected 0, as slots are places of the text")
    separator = document.get("task", {}).get("separator")
    if separator is not None and ends_in_slot(separator):
        yield Problem("/task/separator", f"expected text at its end, behind the slots; found {separator[-60:]!r}")


def ends_in_slot(separator: str) -> bool:
    """Whether a prompt with this separator may end in a slot: without one, the input may be cut behind its last."""
    return not separator or separator.endswith("{slot}")


def _outputs(task: Mapping[str, Any]) -> int | None:
    """How many outputs a head for `task` has: a score for a choice, start and end of a span, or one a label."""
    if task.get("answer") in ("choice", "span"):
        return {"choice": 1, "span": 2}[task["answer"]]
    return len(task["labels"]) if "labels" in task else None


def _image(image: Mapping[str, Any]) -> Iterator[Problem]:
    for name in ("mean", "std"):
        if len(image[name]) != image["channels"]:
            yield Problem(f"/task/image/{name}", f"expected {image['channels']} numbers; found {len(image[name])}")
    if any(deviation <= 0 for deviation in image["std"]):
        yield Problem("/task/image/std", "expected numbers above 0")


def _positions(pointer: str, positions: Mapping[str, Any], context: int | None) -> Iterator[Problem]:
    start = positions["text_start"]
    if not positions["prefix_takes_positions"] and start != 0:
        yield Problem(f"{pointer}/text_start", f"expected 0, as the prefix takes no positions; found {start}")
    if context is not None and start >= context:
        yield Problem(f"{pointer}/text_start", f"expected a position within the context of {context}; found {start}")


def _embedding_prompt(pointer: str, record: Mapping[str, Any], vocabulary: int) -> Iterator[Problem]:
    length, tokens = record["length"], record.get("token_ids")
    if tokens is not None and len(tokens) != length:
        yield Problem(f"{pointer}/token_ids", f"expected {length}, one a prompt vector; found {len(tokens)}")
    if any(token >= vocabulary for token in tokens or []):
        yield Problem(f"{pointer}/token_ids", f"expected token ids below {vocabulary}")


def expected_shapes(document: Mapping[str, Any]) -> dict[str, tuple[str, Shape | None]]:
    """By tensor name: the pointer of the injection that it belongs to, and its shape (None: any)."""
    shapes: dict[str, tuple[str, Shape | None]] = {}
    for index, record in enumerate(document["injections"]):
        for name, shape in _shapes(record, document["backbone"]):
            shapes[name] = (f"/injections/{index}", shape)
    return shapes


def _shapes(record: Mapping[str, Any], backbone: Mapping[str, Any]) -> Iterator[tuple[str, Shape | None]]:
    hidden, kind = backbone["hidden_size"], record["kind"]
    stack, length = record.get("stack", ""), record.get("length", 0)
    layers = backbone["stacks"].get(stack, [])
    if kind == "key_value_prefix":
        for index, layer in enumerate(layers):
            heads = layer["kv_heads"]
            yield names.key(stack, record["attention"], index), (heads, length, layer["key_dim"])
            yield names.value(stack, record["attention"], index), (heads, length, layer["value_dim"])
    elif kind == "hidden_prompt":
        yield from ((names.hidden(stack, index), (length, hidden)) for index in range(len(layers)))
    elif kind == "embedding_prompt":
        yield names.PROMPT, (length, hidden)
    elif kind == "parameter_delta":
        yield from ((names.delta(parameter), None) for parameter in record["names"])
    elif kind == "task_head":
        yield names.HEAD_WEIGHT, (record["labels"], hidden)
        yield names.HEAD_BIAS, (record["labels"],)


def tensor_problems(document: Mapping[str, Any], tensors: Mapping[str, Described]) -> list[Problem]:
    """Tensors that are missing, that nobody asked for, or that have another shape or dtype than the manifest says."""
    wanted = expected_shapes(document)
    found = [
        Problem("/injections", f"expected no tensor {name[:80]!r}; found one") for name in tensors if name not in wanted
    ]
    for name, (pointer, shape) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            found.append(Problem(pointer, f"expected the tensor {name}; found none"))
            continue
        if shape is not None and tuple(tensor.shape) != shape:
            found.append(Problem(pointer, f"expected {name} of shape {list(shape)}; found {list(tensor.shape)}"))
        if tensor.dtype not in DTYPES:
            found.append(Problem(pointer, f"expected {name} as {' or '.join(DTYPES)}; found {tensor.dtype}"))
    return found + _mixed_dtypes(tensors)


def _mixed_dtypes(tensors: Mapping[str, Described]) -> list[Problem]:
    # Runtimes bind one dtype for the whole cache.
    dtypes = {tensor.dtype for name, tensor in tensors.items() if name.endswith((".key", ".value"))}
    if len(dtypes) < 2:
        return []
    return [Problem("/injections", f"expected keys and values of one dtype; found {' and '.join(sorted(dtypes))}")]
