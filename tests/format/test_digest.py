"""Digests: equal for the same weights however they are stored, different for anything else."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save_file

from prefixkit.errors import BackboneError
from prefixkit.format import digest_cache
from prefixkit.format.digest import backbone_digest, config_hash, leaf_line, root, tokenizer_hash

WEIGHTS = {f"layer.{index}.weight": np.arange(index, index + 6, dtype=np.float32).reshape(2, 3) for index in range(5)}
INDEX = "model.safetensors.index.json"


def one_file(folder: Path, weights: dict[str, Any] = WEIGHTS) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shards(folder: Path, count: int) -> Path:
    folder.mkdir()
    index = {}
    for number in range(count):
        part = {name: WEIGHTS[name] for place, name in enumerate(WEIGHTS) if place % count == number}
        save_file(part, folder / f"model-{number}.safetensors")
        index.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_the_tree_is_exactly_this(tmp_path: Path) -> None:
    lines = [
        f"{name}\0F32\x002,3\0{blake3(array.tobytes()).hexdigest()}\n".encode()
        for name, array in sorted(WEIGHTS.items())
    ]
    assert backbone_digest(one_file(tmp_path / "a")) == "b3t-v1:" + blake3(b"".join(lines)).hexdigest()


def test_a_scalar_and_pieces() -> None:
    whole = leaf_line("x", "F32", (), (b"abcd",))
    assert whole == leaf_line("x", "F32", (), (b"a", b"bc", b"d"))
    assert whole == f"x\0F32\0\0{blake3(b'abcd').hexdigest()}\n".encode()
    assert root([whole, b"a"]) == root([b"a", whole])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_and_one_file_have_the_same_digest(count: int, tmp_path: Path) -> None:
    assert backbone_digest(shards(tmp_path / "a", count)) == backbone_digest(one_file(tmp_path / "b"))


def test_every_bit_name_shape_and_dtype_counts(tmp_path: Path) -> None:
    changed = {**WEIGHTS, "layer.0.weight": WEIGHTS["layer.0.weight"] + np.float32(1e-7)}
    renamed = {name.replace("layer.0", "layer.9"): array for name, array in WEIGHTS.items()}
    reshaped = {**WEIGHTS, "layer.0.weight": WEIGHTS["layer.0.weight"].reshape(3, 2)}
    recast = {**WEIGHTS, "layer.0.weight": WEIGHTS["layer.0.weight"].view(np.int32)}
    fewer = {name: array for name, array in WEIGHTS.items() if name != "layer.0.weight"}
    folders = [
        one_file(tmp_path / str(number), weights)
        for number, weights in enumerate([WEIGHTS, changed, renamed, reshaped, recast, fewer])
    ]
    assert len({backbone_digest(folder) for folder in folders}) == 6


def test_only_the_shards_that_the_index_names_count(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", 2)
    before = backbone_digest(folder)
    save_file({"x": np.zeros(3)}, folder / "adapter.safetensors")
    assert backbone_digest(folder) == before


def test_one_file_is_preferred_as_transformers_does(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", 2)
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    assert backbone_digest(folder) == backbone_digest(one_file(tmp_path / "b", {"x": np.zeros(3)}))


def make_large(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As if the weights were worth remembering, and written an hour ago."""
    monkeypatch.setattr(digest_cache, "WORTH_REMEMBERING", 1)
    now = time.time()
    monkeypatch.setattr(digest_cache.time, "time", lambda: now + 3600)


def remembered() -> list[Path]:
    folder = digest_cache.folder() / "digests"
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("cache")
def test_large_weights_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = one_file(tmp_path / "a")
    make_large(monkeypatch, folder)
    first = backbone_digest(folder)
    (entry,) = remembered()
    assert entry.read_text() == first
    entry.write_text("b3t-v1:" + "0" * 64)
    assert backbone_digest(folder) == "b3t-v1:" + "0" * 64
    entry.write_text("nonsense")
    assert backbone_digest(folder) == first


@pytest.mark.usefixtures("cache")
def test_another_size_or_time_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = one_file(tmp_path / "a")
    make_large(monkeypatch, folder)
    backbone_digest(folder)
    changed = {**WEIGHTS, "layer.0.weight": -WEIGHTS["layer.0.weight"]}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", (1, 1))
    assert backbone_digest(folder) == backbone_digest(one_file(tmp_path / "b", changed))


@pytest.mark.usefixtures("cache")
def test_small_or_fresh_weights_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone_digest(one_file(tmp_path / "small"))
    monkeypatch.setattr(digest_cache, "WORTH_REMEMBERING", 1)
    backbone_digest(one_file(tmp_path / "fresh"))
    assert remembered() == []


def test_a_cache_that_cannot_be_written_is_no_matter(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where a folder should be")
    folder = one_file(tmp_path / "a")
    make_large(monkeypatch, folder)
    assert backbone_digest(folder).startswith("b3t-v1:")


def broken(folder: Path, how: str) -> Path:
    folder.mkdir()
    if how == "pytorch only":
        (folder / "pytorch_model.bin").touch()
    elif how == "index to nowhere":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    elif how == "index out of the folder":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    elif how == "index of nothing":
        (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    elif how == "index that is no JSON":
        (folder / INDEX).write_text("{")
    elif how == "tensor in two shards":
        save_file({"a": np.zeros(1)}, folder / "1.safetensors")
        shutil.copy(folder / "1.safetensors", folder / "2.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    elif how == "damaged":
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    return folder


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("empty", "expected model.safetensors or model.safetensors.index.json; found no weights; give the folder"),
        ("pytorch only", "found pytorch_model.bin; convert it: AutoModel"),
        ("index to nowhere", "expected the shard model-1.safetensors; found no such file"),
        ("index out of the folder", "expected names of safetensors files beside it; found '../model.safetensors'"),
        ("index of nothing", "expected a weight_map"),
        ("index that is no JSON", "expected an index of shards"),
        ("tensor in two shards", "expected each tensor in one shard; found a in two"),
        ("damaged", "expected a header of at most 104857600 bytes"),
    ],
)
def test_folders_without_usable_weights(how: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as caught:
        backbone_digest(broken(tmp_path / "a", how))
    assert told in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="expected a model folder; found nothing"):
        backbone_digest(tmp_path / "missing")


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "vocab_size": 64,
}


def config_folder(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_what_is_no_architecture_does_not_count(tmp_path: Path) -> None:
    noise = {
        "transformers_version": "5.23.0",
        "dtype": "float16",
        "torch_dtype": "bfloat16",
        "_name_or_path": "/home/somebody",
        "architectures": ["LlamaForCausalLM"],
        "use_cache": False,
        "eos_token_id": [1, 2],
        "attention_dropout": 0.1,
        "embd_pdrop": 0.1,
        "summary_type": "cls_index",
        "id2label": {"0": "a"},
        "temperature": 0.7,
        "sliding_window_pattern": None,
    }
    bare = config_hash(config_folder(tmp_path / "a", LLAMA))
    assert config_hash(config_folder(tmp_path / "b", {**noise, **LLAMA})) == bare


@pytest.mark.parametrize("field", LLAMA)
def test_every_field_of_the_architecture_counts(field: str, tmp_path: Path) -> None:
    without = {key: value for key, value in LLAMA.items() if key != field}
    ours, other = config_folder(tmp_path / "a", LLAMA), config_folder(tmp_path / "b", without)
    assert config_hash(ours) != config_hash(other)


def test_nested_configurations_are_cleaned_too(tmp_path: Path) -> None:
    noisy = config_folder(tmp_path / "a", {"text_config": {**LLAMA, "dtype": "float16"}})
    assert config_hash(noisy) == config_hash(config_folder(tmp_path / "b", {"text_config": LLAMA}))


@pytest.mark.parametrize("config", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_a_configuration_that_is_none(config: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"config\.json"):
        config_hash(config_folder(tmp_path / "a", config))


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"expected config\.json of a transformers model; found none"):
        config_hash(tmp_path)


def test_the_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    assert tokenizer_hash(tmp_path) is None
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert tokenizer_hash(tmp_path) == "b3-v1:" + blake3(b"{}").hexdigest()
