"""Sequence states of llama.cpp, there and back, and how llama-cpp-python loads one; only loading needs llama.cpp.

A state is loaded into a context of the same kind only: the type of its cache (float16 unless it is told otherwise) and
flash attention (off in llama-cpp-python, automatic in llama.cpp itself) are settings here. llama.cpp's Llama models
rotate neighbouring dimensions where transformers rotates two halves, so that their keys are in another order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.catalogue import chosen, runtime
from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.bridges.described import ANOTHER, described
from prefixkit.bridges.imported import imported
from prefixkit.bridges.in_words import RUNTIMES, of_whom
from prefixkit.bridges.llama_cpp_state import Layer, read_state, write_state
from prefixkit.bridges.narrowed import narrowed
from prefixkit.errors import FormatError, InputError, MismatchError
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry
from prefixkit.prefix import Array, Prefix

_RUNTIME = "llama.cpp"


@dataclass(frozen=True)
class Memory:
    """How llama.cpp remembers a family.

    Attributes:
        interleaved: its RoPE rotates neighbours (`LLAMA_ROPE_TYPE_NORM`), and keys are reordered for it.
        windows: layers with a sliding window have a cache of their own; without, llama.cpp leaves windows out.
    """

    interleaved: bool = False
    windows: bool = False


FAMILIES: Mapping[str, Memory] = {
    "llama": Memory(interleaved=True),
    "mistral": Memory(interleaved=True),
    "gemma2": Memory(windows=True),
    "gemma3_text": Memory(windows=True),
    **dict.fromkeys(("bloom", "falcon", "gpt2", "gpt_neox", "phi3", "qwen2", "qwen3", "qwen3_moe"), Memory()),
}
"""Families in which llama.cpp computes what transformers computes, with a prefix."""


def export_llama_cpp(prefix: Prefix, output: str | Path, *, dtype: str = "float16", flash: str = "off") -> Carried:
    """Write `prefix` as a sequence state, for `load_state` here or `llama_state_seq_load_file`.

    Args:
        dtype: of the cache that it is loaded into: `float16` or `float32`.
        flash: `on` for a context with flash attention.

    Raises:
        FormatError: no prefix of a decoder with text right behind it, a family that was not tried, partial rotation of
            neighbours, numbers that float16 does not reach.
        InputError: the file cannot be written.
        ConfigError: another dtype, or neither `on` nor `off`.
    """
    chosen(runtime("llama-cpp"), {"dtype": dtype, "flash": flash})
    pairs, backbone = keys_and_values(prefix, _RUNTIME), prefix.manifest.backbone
    memory, layers = _memory(of_whom(prefix), backbone.family, backbone.rope), backbone.stacks["decoder"]
    step = "use --set dtype=float32, and a context with type_k and type_v of GGML_TYPE_F32"
    cast, rounded = narrowed(pairs, dtype, otherwise=step)
    rows = [(_to_rows(key, memory.interleaved), _to_rows(value, False)) for key, value in cast]
    task, length = prefix.manifest.task, pairs[0][0].shape[1]
    filler = task.filler_id if task is not None and task.filler_id is not None else 0
    caches = [[rows[index] for index in group] for group in _groups(layers, memory)]
    write_state(Path(output), [filler] * length, caches, transposed=flash == "off")
    step = f'load_state({_context(dtype, flash)}, "{output}"), of prefixkit.bridges.llama_cpp'
    return Carried(output=Path(output), next=step, lost=(*rounded, *_left_out(backbone, memory)))


def import_llama_cpp(source: str | Path, *, backbone: str | Path | None = None) -> Prefix:
    """The keys and values of a sequence state.

    Args:
        source: what `llama_state_seq_save_file` or `export --llama-cpp` wrote.
        backbone: folder or hub id of the model in `transformers` format; needed, as a state names none.

    Raises:
        FormatError: no sequence state, one that is quantised or lost rows, NaN or Infinity, a family that was
            not tried.
        BackboneError: no backbone, or one that cannot be used.
        MismatchError: other layers or shapes than the backbone's.
    """
    path = Path(source)
    known = described(path, backbone=backbone)
    family, rope, layers = known.config.model_type, getattr(known.config, "rope_parameters", None), known.decoder
    memory, caches = _memory(path, family, rope), read_state(path)
    groups = _groups(layers, memory)
    if [len(cache) for cache in caches] != [len(group) for group in groups]:
        expected = f"{' and '.join(str(len(group)) for group in groups)} layers, as {known.name} has"
        found = " and ".join(str(len(cache)) for cache in caches) or "none"
        raise MismatchError(path, expected=expected, found=found, next_step=ANOTHER)
    rows: dict[int, Layer] = {}
    for group, cache in zip(groups, caches, strict=True):
        rows |= dict(zip(group, cache, strict=True))
    pairs = [_from_rows(path, rows[index], layer, memory) for index, layer in enumerate(layers)]
    return imported(path, pairs, known, runtime="llama-cpp")


def load_state(llama: Any, path: str | Path) -> list[int]:
    """Load a sequence state into `llama`, a `llama_cpp.Llama`, and see that all of it is there.

    Returns:
        The filler tokens, one for each row. A prompt is these and then the text's tokens, at least one:
        `llama.generate(filler + llama.tokenize(text, add_bos=False))`. Any other prompt makes llama-cpp-python forget
        the prefix. Load it again for every prompt of a model with sliding windows.

    Raises:
        InputError: llama.cpp refuses the file, or not every row came in.
    """
    import ctypes

    import llama_cpp

    room, count = len(llama.input_ids), ctypes.c_size_t()
    tokens = (llama_cpp.llama_token * room)()
    llama.reset()
    load = llama_cpp.llama_state_seq_load_file
    if not Path(path).is_file() or not load(llama.ctx, os.fsencode(path), 0, tokens, room, count):
        expected = "a sequence state for this model and context: n_ctx, type_k, type_v, flash_attn"
        step = "llama.cpp says why with verbose=True; see the settings of `prefixkit export --llama-cpp`"
        raise InputError(path, expected=expected, found="one that llama.cpp does not load", next_step=step)
    memory, length = llama_cpp.llama_get_memory(llama.ctx), count.value
    held = llama_cpp.llama_memory_seq_pos_min(memory, 0), llama_cpp.llama_memory_seq_pos_max(memory, 0)
    if held != (0, length - 1):
        llama_cpp.llama_memory_clear(memory, True)
        found = f"{held[0]} to {held[1]}"
        raise InputError(path, expected=f"rows at positions 0 to {length - 1} in llama.cpp", found=found)
    filler = list(tokens[:length])
    llama.input_ids[:length], llama.n_tokens = filler, length
    return filler


def _context(dtype: str, flash: str) -> str:
    """How llama-cpp-python makes a context that takes the state; float16 without flash attention is its default."""
    types = ", type_k=0, type_v=0" if dtype == "float32" else ""
    return f'Llama("MODEL.gguf"{types}{", flash_attn=True" if flash == "on" else ""})'


def _memory(where: object, family: str, rope: Mapping[str, Any] | None) -> Memory:
    memory = FAMILIES.get(family)
    if memory is None:
        expected = f"a backbone of {', '.join(sorted(FAMILIES))}"
        found = f"{family}, which was not tried with {_RUNTIME}"
        raise FormatError(where, expected=expected, found=found, next_step=RUNTIMES)
    part = (rope or {}).get("partial_rotary_factor", 1)
    if memory.interleaved and part != 1:
        expected, found = f"RoPE over whole heads of {family}", f"over {part} of each"
        raise FormatError(where, expected=expected, found=found, next_step=RUNTIMES)
    return memory


def _groups(layers: Sequence[LayerGeometry], memory: Memory) -> list[list[int]]:
    """The layers of each of llama.cpp's caches; without a sliding layer there is one."""
    sliding = [index for index, layer in enumerate(layers) if layer.window is not None] if memory.windows else []
    full = [index for index in range(len(layers)) if index not in sliding]
    return [full, sliding] if sliding else [full]


def _to_rows(array: Array, interleaved: bool) -> Array:
    """[prefix, kv_heads * head_dim] of [kv_heads, prefix, head_dim]; both halves of each head by turns, or as it is."""
    heads, length, dim = array.shape
    if interleaved:
        array = array.reshape(heads, length, 2, dim // 2).swapaxes(2, 3)
    return array.reshape(heads, length, dim).swapaxes(0, 1).reshape(length, heads * dim)


def _from_rows(source: Path, rows: Layer, layer: LayerGeometry, memory: Memory) -> Layer:
    widths = layer.kv_heads * layer.key_dim, layer.kv_heads * layer.value_dim
    found = rows[0].shape[1], rows[1].shape[1]
    if found != widths:
        expected = f"rows of {widths[0]} and {widths[1]} numbers, as the backbone's"
        raise MismatchError(source, expected=expected, found=f"{found[0]} and {found[1]}", next_step=ANOTHER)
    key, value = (array.reshape(len(array), layer.kv_heads, -1).swapaxes(0, 1) for array in rows)
    if memory.interleaved:
        heads, length, dim = key.shape
        key = key.reshape(heads, length, dim // 2, 2).swapaxes(2, 3).reshape(heads, length, dim)
    return key, value


def _left_out(backbone: BackboneIdentity, memory: Memory) -> list[str]:
    windows = {layer.window for layer in backbone.stacks["decoder"] if layer.window is not None}
    if memory.windows or not windows:
        return []
    length = min(windows)
    return [f"{_RUNTIME} leaves out the sliding windows of {backbone.family}: right up to {length} tokens in all"]
