"""Digests that say which weights, which configuration, which tokenizer and which prefix.

The tree `b3t-v1`: a leaf is the BLAKE3 of one tensor's little-endian bytes as stored; the root is the BLAKE3 over the
sorted lines `name\\0dtype\\0shape\\0hex\\n`, with the shape in decimals and commas between them. Which files hold the
tensors, and in which order, does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from prefixkit.errors import BackboneError, FormatError
from prefixkit.format import digest_cache
from prefixkit.format.canonical import canonical, canonical_hash, read_json, tagged
from prefixkit.format.header import TensorEntry, opened, read_header

TREE_TAG = "b3t-v1:"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CHUNK = 8 * 2**20

# What a config.json says beside the architecture: versions, training, generation, labels, how to run it.
_NOT_ARCHITECTURE = {
    *("transformers_version", "dtype", "torch_dtype", "_name_or_path", "_commit_hash", "architectures", "auto_map"),
    *("use_cache", "pretraining_tp", "gradient_checkpointing", "use_bfloat16", "attn_implementation"),
    *(
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "return_dict",
        "return_dict_in_generate",
    ),
    *(
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_router_logits",
        "torchscript",
        "pruned_heads",
    ),
    *("initializer_range", "initializer_factor", "init_std", "attn_pdrop", "embd_pdrop", "resid_pdrop", "layerdrop"),
    *("router_aux_loss_coef", "router_jitter_noise", "problem_type", "id2label", "label2id", "finetuning_task"),
    *("task_specific_params", "chunk_size_feed_forward", "cross_attention_hidden_size", "tokenizer_class", "prefix"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *(
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "suppress_tokens",
        "begin_suppress_tokens",
    ),
    *("exponential_decay_length_penalty", "remove_invalid_values", "generation_config"),
}


def leaf_line(name: str, dtype: str, shape: Sequence[int], data: Iterable[bytes | memoryview]) -> bytes:
    """One tensor's line of the tree, from its bytes in pieces."""
    leaf = blake3(max_threads=blake3.AUTO)
    for piece in data:
        leaf.update(piece)
    shape_text = ",".join(map(str, shape))
    return f"{name}\0{dtype}\0{shape_text}\0{leaf.hexdigest()}\n".encode()


def root(lines: Iterable[bytes]) -> str:
    """The tagged root of the tree over `lines`, which may come in any order."""
    return TREE_TAG + blake3(b"".join(sorted(lines))).hexdigest()


def content_digest(lines: Iterable[bytes], document: Mapping[str, Any]) -> str:
    """The digest of a whole prefix: its tensors' `lines`, and one line for the manifest without its `content`."""
    rest = {key: value for key, value in document.items() if key != "content"}
    # No tensor can have this name, which safetensors keeps for itself.
    return root([*lines, leaf_line("__metadata__", "JSON", (), (canonical(rest, "manifest"),))])


def backbone_digest(folder: str | Path) -> str:
    """The tree over all tensors of the safetensors weights in `folder`, as stored; equal for one file and for shards.

    Large weights are hashed once: the result is remembered by path, size and time of change.

    Raises:
        BackboneError: no such folder, no safetensors weights in it, a missing or damaged shard.
    """
    files = weight_files(folder)
    known = digest_cache.look_up(files)
    if known is not None:
        return known
    try:
        digest = root(_file_lines(files, folder))
    except FormatError as error:
        raise BackboneError(error.where, expected=error.expected, found=error.found) from error
    digest_cache.remember(files, digest)
    return digest


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """The safetensors files that hold the weights in `folder`: `model.safetensors`, or those that the index names.

    Raises:
        BackboneError: none, or an index that names a missing one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise BackboneError(folder, expected="a model folder", found=found, next_step="check the path")
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if not (folder / _INDEX).is_file():
        raise _no_weights(folder)
    files = tuple(folder / name for name in _shards(folder / _INDEX))
    for file in files:
        if not file.is_file():
            step = "download the model again"
            raise BackboneError(
                folder / _INDEX, expected=f"the shard {file.name}", found="no such file", next_step=step
            )
    return files


def config_hash(folder: str | Path) -> str:
    """The hash of the architecture that config.json states, whatever version wrote it and however it is to be run.

    Raises:
        BackboneError: no config.json, or one that is no JSON object.
    """
    path = Path(folder) / "config.json"
    return canonical_hash(_architecture(read_config(folder)), path)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The document in `folder`'s config.json. Raises BackboneError as `config_hash` does."""
    path = Path(folder) / "config.json"
    return _json_object(path, "config.json of a transformers model")


def tokenizer_hash(folder: str | Path) -> str | None:
    """The hash of `folder`'s tokenizer.json, byte for byte, or None without one."""
    path = Path(folder) / "tokenizer.json"
    return tagged(path.read_bytes()) if path.is_file() else None


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what is no architecture; a field that is null says no more than a missing one."""
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None and not _is_noise(key)
    }


def _is_noise(key: str) -> bool:
    # Dropout acts in training only; token ids and summaries belong to generation and to other heads.
    return key in _NOT_ARCHITECTURE or "dropout" in key or key.startswith("summary_") or key.endswith("_token_id")


def _file_lines(files: Iterable[Path], folder: str | Path) -> list[bytes]:
    lines: dict[str, bytes] = {}
    for file in files:
        header = read_header(file)
        with opened(file) as weights:
            for name, entry in header.tensors.items():
                if name in lines:
                    raise BackboneError(folder, expected="each tensor in one shard", found=f"{name} in two")
                weights.seek(header.data_start + entry.begin)
                lines[name] = leaf_line(name, entry.dtype, entry.shape, _pieces(weights, entry))
    return list(lines.values())


def _pieces(weights: BinaryIO, entry: TensorEntry) -> Iterator[bytes]:
    # Reads rather than a memory map: a file that shrinks under a map kills the process.
    left = entry.end - entry.begin
    while left > 0:
        piece = weights.read(min(left, _CHUNK))
        if not piece:
            raise FormatError(weights.name, expected="all of its tensors", found="a file that shrank meanwhile")
        left -= len(piece)
        yield piece


def _shards(index: Path) -> list[str]:
    names = _json_object(index, "an index of shards").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise BackboneError(index, expected="a weight_map from tensors to files", found=type(names).__name__)
    for name in set(names.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BackboneError(index, expected="names of safetensors files beside it", found=repr(name[:80]))
    return sorted(set(names.values()))


def _json_object(path: Path, expected: str) -> dict[str, Any]:
    try:
        stored = read_json(path.read_bytes(), path)
    except OSError as error:
        found = "none" if isinstance(error, FileNotFoundError) else (error.strerror or "").lower()
        step = "give the folder of a transformers model"
        raise BackboneError(path, expected=expected, found=found, next_step=step) from error
    except FormatError as error:
        raise BackboneError(path, expected=expected, found=error.found) from error
    if not isinstance(stored, dict):
        raise BackboneError(path, expected=expected, found=f"a JSON {type(stored).__name__}")
    return stored


def _no_weights(folder: Path) -> BackboneError:
    expected = f"{_SINGLE} or {_INDEX}"
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5")
    )
    if "pytorch_model.bin" in others or "pytorch_model.bin.index.json" in {path.name for path in folder.iterdir()}:
        step = "convert it: AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
    else:
        step = "give the folder of a transformers model"
    return BackboneError(folder, expected=expected, found=", ".join(others[:3]) or "no weights", next_step=step)
