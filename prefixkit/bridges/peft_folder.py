"""The folder that PEFT saves a prefix or a prompt in: its adapter_config.json and its one tensor.

PEFT keeps `prompt_embeddings`. Of keys and values (PREFIX_TUNING, CARTRIDGE) it is [prefix, layers * 2 * kv_heads *
head_dim], ordered slot, layer, key before value, head, dimension. With `prefix_projection` it stores the projected
result, which is the same thing. Its `num_attention_heads` are the heads of keys and values, its `token_dim` is kv_heads
* head_dim. Of a prompt (PROMPT_TUNING, P_TUNING: what its encoder makes) it is [prompt, hidden], and twice as many
vectors for an encoder-decoder. Text begins at position `num_virtual_tokens`. Measured with PEFT 0.21.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefixkit.bridges.safetensors_arrays import stored_tensor
from prefixkit.errors import FormatError
from prefixkit.format.atomic import replacing_folder, write_bytes, write_stream
from prefixkit.format.canonical import read_json
from prefixkit.format.header import read_header, read_tensors
from prefixkit.format.writer import encode
from prefixkit.prefix import DTYPES, Array

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_TENSOR = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A prefix or a prompt as PEFT describes it.

    Attributes:
        kind: one of `KEYS_AND_VALUES` or `PROMPTS`.
        length: slots, or vectors.
        width: of a slot in one layer, kv_heads * head_dim; of a vector.
        layers, kv_heads: of keys and values.
        frozen: leading slots that training leaves alone; PEFT calls a prefix that has them, or may, a cartridge.
        pair: whether it is for an encoder-decoder.
        stacks: PEFT's `num_transformer_submodules`, by which it counts vectors and splits keys and values.
        base, revision: the name of the backbone; empty and None where unknown.
    """

    kind: str
    length: int
    width: int
    layers: int = 1
    kv_heads: int = 1
    frozen: int = 0
    pair: bool = False
    stacks: int = 1
    base: str = ""
    revision: str | None = None

    @property
    def is_prompt(self) -> bool:
        """Whether it is vectors rather than keys and values."""
        return self.kind in PROMPTS

    @property
    def head_dim(self) -> int:
        """Dimensions of a head of keys or values."""
        return self.width // self.kv_heads

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor: [prompt, hidden], or, unflattened, [prefix, layers, key or value, kv_heads, head_dim]."""
        if self.is_prompt:
            return self.length * self.stacks, self.width
        return self.length, self.layers, 2, self.kv_heads, self.head_dim


def read_adapter(folder: Path) -> tuple[Adapter, Array]:
    """What the folder describes, and its tensor in `Adapter.shape`.

    Raises:
        FormatError: no such folder, damaged files, or another kind of adapter.
    """
    adapter = _adapter(folder)
    return adapter, _flat(folder / WEIGHTS, adapter).reshape(adapter.shape)


def write_adapter(folder: str | Path, adapter: Adapter, tensor: Array) -> None:
    """Write a folder that PEFT loads, whole or not at all.

    Only a folder that this function wrote is replaced. Raises InputError for another one, and where it cannot write.
    """
    config = json.dumps(_config(adapter), indent=2, sort_keys=True)
    flat = np.ascontiguousarray(tensor).reshape(adapter.shape[0], -1)
    with replacing_folder(folder, marker=CONFIG if _is_ours(Path(folder)) else None) as target:
        write_bytes(target / CONFIG, f"{config}\n".encode())
        write_stream(target / WEIGHTS, encode({_TENSOR: stored_tensor(flat)}, {"format": "pt"}))


def _is_ours(folder: Path) -> bool:
    """Whether it holds what `write_adapter` writes and nothing else; PEFT itself says more in its configuration."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {CONFIG, WEIGHTS}:
        return False
    stored = read_json((folder / CONFIG).read_bytes(), folder / CONFIG)
    written = (_config(Adapter(kind=known, length=1, width=1)) for known in (*KEYS_AND_VALUES, *PROMPTS))
    return isinstance(stored, dict) and any(
        config["peft_type"] == stored.get("peft_type") and set(config) == set(stored) for config in written
    )


def _adapter(folder: Path) -> Adapter:
    path = folder / CONFIG
    if not path.is_file():
        found = "none" if folder.is_dir() else "no such folder"
        raise FormatError(folder, expected=f"a PEFT folder with {CONFIG}", found=found, next_step="check the path")
    stored = read_json(path.read_bytes(), path)
    if not isinstance(stored, dict):
        raise FormatError(path, expected="a JSON object", found=f"a {type(stored).__name__}")
    kind = stored.get("peft_type")
    if kind not in (*KEYS_AND_VALUES, *PROMPTS):
        expected = f"peft_type {', '.join(KEYS_AND_VALUES + PROMPTS[:-1])} or {PROMPTS[-1]}"
        raise FormatError(path, expected=expected, found=repr(kind)[:80])
    pair, stacks = _stacks(path, stored)
    length = _count(path, stored, "num_virtual_tokens")
    return Adapter(
        kind=kind,
        length=length,
        width=_count(path, stored, "token_dim"),
        pair=pair,
        stacks=stacks,
        base=_text(path, stored, "base_model_name_or_path") or "",
        revision=_text(path, stored, "revision"),
        **({} if kind in PROMPTS else _of_keys_and_values(path, stored, length)),
    )


def _stacks(path: Path, stored: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether it is for an encoder-decoder, and `num_transformer_submodules`."""
    asked = stored.get("task_type") == "SEQ_2_SEQ_LM"
    stacks = stored.get("num_transformer_submodules") or 1 + asked
    pair = asked or stacks == 2
    # PEFT gives an encoder-decoder no keys and values that are split for a decoder.
    allowed = (1, 2) if stored["peft_type"] in PROMPTS and pair else (1 + pair,)
    if stacks not in allowed:
        expected = f"num_transformer_submodules {' or '.join(map(str, allowed))} for its task_type"
        raise FormatError(path, expected=expected, found=repr(stacks)[:80])
    return pair, stacks


def _of_keys_and_values(path: Path, stored: Mapping[str, Any], length: int) -> dict[str, int]:
    width, heads = _count(path, stored, "token_dim"), _count(path, stored, "num_attention_heads")
    if width % heads:
        expected = f"token_dim to be a multiple of its {heads} heads"
        raise FormatError(path, expected=expected, found=str(width))
    frozen = stored.get("num_frozen_tokens", 1) if stored["peft_type"] == "CARTRIDGE" else 0
    if type(frozen) is not int or not 0 <= frozen <= length:
        raise FormatError(path, expected=f"num_frozen_tokens of 0 to {length}", found=repr(frozen)[:80])
    return {"layers": _count(path, stored, "num_layers"), "kv_heads": heads, "frozen": frozen}


def _count(path: Path, stored: Mapping[str, Any], name: str) -> int:
    value = stored.get(name)
    if type(value) is not int or value < 1:
        raise FormatError(path, expected=f"{name}, a whole number from 1", found=repr(value)[:80])
    return value


def _text(path: Path, stored: Mapping[str, Any], name: str) -> str | None:
    value = stored.get(name)
    if value is not None and not isinstance(value, str):
        raise FormatError(path, expected=f"{name}, a string or null", found=repr(value)[:80])
    return value


def _flat(path: Path, adapter: Adapter) -> Array:
    if not path.is_file() and path.with_suffix(".bin").is_file():
        step = "load it with PEFT and save it again: save_pretrained writes safetensors"
        raise FormatError(path.parent, expected=WEIGHTS, found="adapter_model.bin, a pickle", next_step=step)
    header = read_header(path)
    rows = adapter.shape[0]
    shape = (rows, int(np.prod(adapter.shape[1:], dtype=object)))
    others = sorted(set(header.tensors) - {_TENSOR})
    if others or not header.tensors:
        step = "save it without modules_to_save: task heads are not imported" if others else ""
        raise FormatError(path, expected=f"only {_TENSOR}", found=others[0] if others else "nothing", next_step=step)
    entry = header.tensors[_TENSOR]
    if entry.shape != shape or entry.dtype not in DTYPES:
        expected = f"{_TENSOR} of {list(shape)}, as {CONFIG} says, in F32, F16 or BF16"
        raise FormatError(path, expected=expected, found=f"{list(entry.shape)} in {entry.dtype}")
    data = dict(read_tensors(path, header))[_TENSOR]
    return np.frombuffer(data, dtype=DTYPES[entry.dtype])


def _config(adapter: Adapter) -> dict[str, Any]:
    config = {
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "num_transformer_submodules": adapter.stacks,
        "num_virtual_tokens": adapter.length,
        "peft_type": adapter.kind,
        "revision": adapter.revision,
        "task_type": "SEQ_2_SEQ_LM" if adapter.pair else "CAUSAL_LM",
        "token_dim": adapter.width,
    }
    if adapter.is_prompt:
        return config
    config |= {"num_attention_heads": adapter.kv_heads, "num_layers": adapter.layers}
    if adapter.kind == "CARTRIDGE":
        return {**config, "num_frozen_tokens": adapter.frozen}
    return {**config, "encoder_hidden_size": adapter.width, "prefix_projection": False}
