"""A prefix in memory: its manifest and its arrays, and the way from and to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit.errors import FormatError, InputError
from prefixkit.format import match, names
from prefixkit.format.atomic import write_stream
from prefixkit.format.canonical import canonical
from prefixkit.format.checks import Problem, below
from prefixkit.format.consistency import tensor_problems
from prefixkit.format.digest import content_digest, leaf_line
from prefixkit.format.finite import all_finite
from prefixkit.format.header import read_tensors
from prefixkit.format.manifest import BackboneIdentity, Manifest, document, parse
from prefixkit.format.stored import KEY, data_problems, read_stored, refuse
from prefixkit.format.validate import problems
from prefixkit.format.writer import StoredTensor, encode

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: Mapping[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""By the name that safetensors has for it, each dtype that a prefix may have."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a frozen backbone receives, as arrays.

    Attributes:
        manifest: what the prefix says of itself.
        tensors: arrays of float32, float16 or bfloat16 (`ml_dtypes.bfloat16`) under the names of schemas/README.md,
            such as `decoder.self.layers.3.key` of shape [kv_heads, prefix, key_dim]. Loaded arrays are read-only.
    """

    manifest: Manifest
    tensors: dict[str, Array]


def load(path: str | Path, *, verify: bool = True) -> Prefix:
    """Read and judge the prefix file at `path`.

    Args:
        verify: also look at every number and compare the content digest.

    Raises:
        FormatError: anything that schemas/README.md does not allow; the message names the first problem and how many
            more there are, and `prefixkit inspect` lists them all.
    """
    stored = read_stored(path)
    refuse(path, stored.problems)
    data = dict(read_tensors(path, stored.header))
    if verify:
        refuse(path, data_problems(stored, data.items()))
    arrays = {}
    for name, entry in stored.header.tensors.items():
        arrays[name] = np.frombuffer(data[name], dtype=DTYPES[entry.dtype]).reshape(entry.shape)
    return Prefix(parse(stored.document), arrays)


def save(prefix: Prefix, path: str | Path) -> Prefix:
    """Write `prefix` to `path`, whole or not at all; the same prefix gives the same bytes.

    Returns:
        The prefix as it was written: with its content digest.

    Raises:
        FormatError: the prefix breaks the specification: another shape than the manifest says, another dtype, NaN.
        InputError: the file cannot be written. In both cases what was at `path` stays.
    """
    tensors, described = _as_stored(prefix)
    found = problems(described) or tensor_problems(described, tensors) or _not_finite(tensors)
    refuse(path, found, next_step="correct it and save it again; nothing was written")
    metadata = {"format": "pt", KEY: canonical(described, path).decode()}
    write_stream(path, encode(tensors, metadata))
    return Prefix(replace(prefix.manifest, content=described["content"]), prefix.tensors)


def content_of(prefix: Prefix) -> str:
    """The content digest that `prefix` has in a file, whether it came from one or not."""
    content: str = _as_stored(prefix)[1]["content"]
    return content


@dataclass(frozen=True)
class Difference:
    """Where two prefixes differ (a JSON pointer into the manifest, or a tensor's name), and how."""

    where: str
    how: str

    def __str__(self) -> str:
        return f"{self.where}: {self.how}"


def compare(ours: Prefix, theirs: Prefix) -> list[Difference]:
    """All differences between two prefixes, those of the manifests first; the content digest follows from the rest."""
    left, right = (document(replace(prefix.manifest, content=None)) for prefix in (ours, theirs))
    found = list(_document_differences("", left, right))
    for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        how = _array_difference(ours.tensors.get(name), theirs.tensors.get(name))
        if how:
            found.append(Difference(name, how))
    return found


def key_values(prefix: Prefix, *, stack: str = "decoder", attention: str = "self") -> list[tuple[Array, Array]]:
    """The keys [kv_heads, prefix, key_dim] and values [kv_heads, prefix, value_dim] of each layer.

    Raises:
        InputError: the prefix has no keys and values for this attention.
    """
    for record in prefix.manifest.injections:
        if (record.kind, record.stack, record.attention) == ("key_value_prefix", stack, attention):
            layers = range(len(prefix.manifest.backbone.stacks[stack]))
            keys = (prefix.tensors[names.key(stack, attention, layer)] for layer in layers)
            values = (prefix.tensors[names.value(stack, attention, layer)] for layer in layers)
            return list(zip(keys, values, strict=True))
    kinds = ", ".join(record.kind for record in prefix.manifest.injections)
    step = "`prefixkit export --onnx` folds a prompt; use the prefix.safetensors of its folder"
    raise InputError("prefix", expected=f"keys and values for {stack}.{attention}", found=kinds, next_step=step)


def matches(prefix: Prefix, identity: BackboneIdentity, allow_mismatch: bool = False) -> match.Level:
    """Check that `identity` is the backbone that `prefix` was made for.

    Args:
        allow_mismatch: accept another configuration, other weights or another tokenizer; other shapes stay refused, as
            they cannot run.

    Returns:
        The deepest level of the model that was compared and is equal: `weights`, or `config` or `geometry`
        where hashes are unknown.

    Raises:
        MismatchError: in one line, the level that was checked and what differs.
    """
    where = f"prefix for {prefix.manifest.backbone.name} on {identity.name}"
    wanted = match.facts(prefix.manifest.backbone)
    return match.check(where, wanted, match.facts(identity), allow_mismatch=allow_mismatch)


def _document_differences(pointer: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _document_differences(below(pointer, key), ours.get(key), theirs.get(key))
    elif _of_records(ours) and _of_records(theirs) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _document_differences(below(pointer, str(index)), *pair)
    elif ours != theirs:
        told = ("nothing" if value is None else repr(value) for value in (ours, theirs))
        yield Difference(pointer, " and ".join(told))


def _of_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _array_difference(ours: Array | None, theirs: Array | None) -> str:
    if ours is None or theirs is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        told = ("nothing" if array is None else f"{array.dtype} {list(array.shape)}" for array in (ours, theirs))
        return " and ".join(told)
    if ours.tobytes() == theirs.tobytes():
        return ""
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max()
    return f"numbers that differ by at most {apart:g}"


def _as_stored(prefix: Prefix) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors of `prefix`, and the document of its manifest with the content digest."""
    tensors = {name: _stored(name, array) for name, array in prefix.tensors.items()}
    lines = [leaf_line(name, tensor.dtype, tensor.shape, (tensor.data,)) for name, tensor in tensors.items()]
    described = document(prefix.manifest)
    return tensors, {**described, "content": content_digest(lines, described)}


def _stored(name: str, array: Array) -> StoredTensor:
    for dtype, numpy_dtype in DTYPES.items():
        if array.dtype.newbyteorder("<") == numpy_dtype:
            data = np.ascontiguousarray(array).astype(numpy_dtype, copy=False).tobytes()
            return StoredTensor(dtype, tuple(array.shape), data)
    raise FormatError(f"tensor {name}", expected="float32, float16 or bfloat16", found=str(array.dtype))


def _not_finite(tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    return [
        Problem("/injections", f"expected finite numbers in {name}; found NaN or Infinity")
        for name, tensor in tensors.items()
        if not all_finite(tensor.data, tensor.dtype)
    ]
