"""mlx-lm's prompt cache: one safetensors file, in the layout since mlx-lm 0.32 and in that before it.

Layer `l` keeps `l.0`, its keys, and `l.1`, its values, both [1, kv_heads, length, head_dim]. Everything else is strings
in the file's metadata, lists of lists with their indices joined by dots:

- since 0.32: `0.NAME` what the user states, `1.l` the class of each layer's cache, `2.i` the names of tensors that are
  plain numbers (`2.0` is empty). Numbers are tensors too: `l.2` is the offset, which is the position of the next token;
  a rotating cache adds `l.3` to `l.5`: rows to keep, the window, the row that is written next.
- before: `0.l` the numbers of each layer (empty, or those of a rotating cache as `0.l.0` to `0.l.3` in the order keep,
  window, offset, next row), `1.NAME` what the user states, `2.l` the class.

Measured with mlx-lm 0.32.2, 0.31.3 and 0.28.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefixkit.bridges.safetensors_arrays import stored_tensor
from prefixkit.errors import FormatError
from prefixkit.format.atomic import write_stream
from prefixkit.format.header import Header, read_header, read_tensors
from prefixkit.format.writer import StoredTensor, encode
from prefixkit.prefix import DTYPES, Array

PLAIN, ROTATING = "KVCache", "RotatingKVCache"
_AGAIN = "save_prompt_cache writes it"


@dataclass(frozen=True, eq=False)
class LayerCache:
    """Keys and values [kv_heads, length, head_dim] of one layer; `window` for a cache that rotates in so many rows."""

    key: Array
    value: Array
    window: int | None = None


def write_cache(path: Path, layers: Sequence[LayerCache], stated: Mapping[str, str], *, older: bool) -> None:
    """Write what `mlx_lm.models.cache.load_prompt_cache` reads; `stated` is the user's part of the metadata.

    Raises:
        InputError: the file cannot be written.
    """
    tensors: dict[str, StoredTensor] = {}
    numbers: list[list[int]] = []
    for index, layer in enumerate(layers):
        for place, rows in enumerate((layer.key, layer.value)):
            tensors[f"{index}.{place}"] = stored_tensor(rows, (1, *rows.shape))
        offset = layer.key.shape[1]
        numbers.append([offset] if layer.window is None else [offset, 0, layer.window, offset])
    classes = [PLAIN if layer.window is None else ROTATING for layer in layers]
    if older:
        metadata = _older_metadata(numbers, classes, stated)
    else:
        metadata = _current_metadata(numbers, classes, stated)
        for index, values in enumerate(numbers):
            for place, value in enumerate(values, 2):
                tensors[f"{index}.{place}"] = StoredTensor("I32", (), value.to_bytes(4, "little"))
    write_stream(path, encode(tensors, metadata))


def read_cache(path: Path) -> tuple[list[LayerCache], dict[str, str]]:
    """The layers of a prompt cache in either layout, and what its user stated.

    Raises:
        FormatError: no such file, no prompt cache, quantised or recurrent layers, several sequences, rows that
            are gone, tensors that belong to none of its layers.
    """
    header = read_header(path)
    current = header.metadata.get("2.0") == ""
    classes, user = _listed(header, "1" if current else "2"), "0" if current else "1"
    if not classes:
        found = "other safetensors"
        raise FormatError(path, expected="a prompt cache of mlx-lm", found=found, next_step=_AGAIN)
    data = dict(read_tensors(path, header))
    layers = [_layer(path, header, data, index, name, current) for index, name in enumerate(classes)]
    _refuse_others(path, header, classes, current)
    prefix = f"{user}."
    stated = {name.removeprefix(prefix): text for name, text in header.metadata.items() if name.startswith(prefix)}
    return layers, stated


def _current_metadata(numbers: list[list[int]], classes: list[str], stated: Mapping[str, str]) -> dict[str, str]:
    metadata = {f"0.{name}": text for name, text in stated.items()} | {"2.0": ""}
    metadata |= {f"1.{index}": name for index, name in enumerate(classes)}
    scalars = [f"{index}.{place}" for index, values in enumerate(numbers) for place in range(2, 2 + len(values))]
    for index, name in enumerate(scalars, 1):
        metadata |= {f"2.{index}.0": name, f"2.{index}.1": "scalar"}
    return metadata


def _older_metadata(numbers: list[list[int]], classes: list[str], stated: Mapping[str, str]) -> dict[str, str]:
    metadata = {f"1.{name}": text for name, text in stated.items()}
    for index, (values, name) in enumerate(zip(numbers, classes, strict=True)):
        metadata[f"2.{index}"] = name
        if name == PLAIN:
            metadata[f"0.{index}"] = ""
        else:
            offset, keep, window, following = values
            metadata |= {f"0.{index}.{place}": str(n) for place, n in enumerate((keep, window, offset, following))}
    return metadata


def _listed(header: Header, group: str) -> list[str]:
    names: list[str] = []
    while (name := header.metadata.get(f"{group}.{len(names)}")) is not None:
        names.append(name)
    return names


def _layer(path: Path, header: Header, data: Mapping[str, bytes], index: int, name: str, current: bool) -> LayerCache:
    if name not in (PLAIN, ROTATING):
        expected = f"{PLAIN} or {ROTATING} in layer {index}"
        raise FormatError(path, expected=expected, found=name[:80], next_step="make the cache without quantising it")
    key, value = (_rows(path, header, data, f"{index}.{place}") for place in (0, 1))
    if current:
        numbers = [_number(path, header, data, f"{index}.{place}") for place in range(2, 3 if name == PLAIN else 6)]
    else:
        texts = [header.metadata.get(f"0.{index}.{place}", "") for place in (2, 0, 1, 3)]
        numbers = [key.shape[1]] if name == PLAIN else [_whole(path, index, text) for text in texts]
    offset, window = numbers[0], numbers[2] if name == ROTATING else None
    _refuse_lost_rows(path, index, numbers, min(key.shape[1], value.shape[1]))
    return LayerCache(key[:, :offset], value[:, :offset], window)


def _refuse_lost_rows(path: Path, index: int, numbers: list[int], held: int) -> None:
    offset = numbers[0]
    turned = len(numbers) > 1 and (offset > numbers[2] or offset != numbers[3])
    if turned or not 1 <= offset <= held:
        found = f"a window that rotated over {offset} tokens" if turned else f"{held} for {offset} tokens"
        step = "make the cache of a shorter text, or without --max-kv-size" if turned else _AGAIN
        raise FormatError(path, expected=f"every row in layer {index}", found=found, next_step=step)


def _refuse_others(path: Path, header: Header, classes: list[str], current: bool) -> None:
    counts = [(3 if name == PLAIN else 6) if current else 2 for name in classes]
    known = {f"{index}.{place}" for index, count in enumerate(counts) for place in range(count)}
    if others := sorted(set(header.tensors) - known):
        expected = f"the tensors of {len(classes)} layers and nothing else"
        raise FormatError(path, expected=expected, found=others[0][:80], next_step=_AGAIN)


def _rows(path: Path, header: Header, data: Mapping[str, bytes], name: str) -> Array:
    entry = header.tensors.get(name)
    if entry is None or entry.dtype not in DTYPES or len(entry.shape) != 4 or entry.shape[0] != 1:
        found = "none" if entry is None else f"{list(entry.shape)} in {entry.dtype}"
        expected = f"tensor {name} of [1, kv_heads, length, head_dim] in F32, F16 or BF16"
        raise FormatError(path, expected=expected, found=found)
    return np.frombuffer(data[name], dtype=DTYPES[entry.dtype]).reshape(entry.shape[1:])


def _number(path: Path, header: Header, data: Mapping[str, bytes], name: str) -> int:
    entry = header.tensors.get(name)
    if entry is None or entry.dtype != "I32" or entry.shape:
        found = "none" if entry is None else f"{list(entry.shape)} in {entry.dtype}"
        raise FormatError(path, expected=f"tensor {name}, one number in I32", found=found)
    return int.from_bytes(data[name], "little", signed=True)


def _whole(path: Path, index: int, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise FormatError(path, expected=f"four whole numbers for layer {index}", found=repr(text)[:80])
    return int(text)
