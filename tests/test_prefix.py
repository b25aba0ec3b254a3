"""A prefix to a file and back: the same numbers, the same bytes, and nothing that breaks the specification."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from prefixkit.errors import FormatError, InputError, MismatchError
from prefixkit.format.canonical import canonical
from prefixkit.format.digest import content_digest, leaf_line
from prefixkit.format.header import read_header, read_tensors
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry, document
from prefixkit.format.writer import StoredTensor, encode
from prefixkit.prefix import Prefix, compare, key_values, load, matches, save
from tests.prefixes import GOLDEN, small_prefix

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: Any, tmp_path: Path) -> None:
    prefix = small_prefix(dtype=dtype, seed=0)
    saved = save(prefix, tmp_path / "x")
    loaded = load(tmp_path / "x")
    assert loaded.manifest == saved.manifest == replace(prefix.manifest, content=saved.manifest.content)
    assert compare(loaded, prefix) == []
    for name, array in prefix.tensors.items():
        assert loaded.tensors[name].dtype == array.dtype
        assert loaded.tensors[name].tobytes() == array.tobytes()


def test_the_golden_file_is_written_to_the_byte(tmp_path: Path) -> None:
    save(small_prefix(layers=1, length=2), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == GOLDEN.read_bytes()


def test_the_golden_file_is_read() -> None:
    assert compare(load(GOLDEN), small_prefix(layers=1, length=2)) == []


def test_the_same_prefix_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    prefix = small_prefix(seed=0)
    provenance = replace(prefix.manifest.provenance, config={"b": 1, "a": {"d": 1, "c": 2}})
    shuffled = replace(prefix.manifest.provenance, config={"a": {"c": 2, "d": 1}, "b": 1})
    save(Prefix(replace(prefix.manifest, provenance=provenance), prefix.tensors), tmp_path / "a")
    tensors = dict(reversed(prefix.tensors.items()))
    save(Prefix(replace(prefix.manifest, provenance=shuffled), tensors), tmp_path / "b")
    save(load(tmp_path / "a"), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_opens_it(dtype: Any, tmp_path: Path) -> None:
    prefix = small_prefix(dtype=dtype, seed=0)
    save(prefix, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as opened:
        assert set(opened.metadata()) == {"format", "prefixkit"}
        for name, array in prefix.tensors.items():
            assert torch.equal(opened.get_tensor(name).float(), torch.from_numpy(array.astype(np.float32)))


def test_arrays_of_any_layout_and_byte_order(tmp_path: Path) -> None:
    prefix = small_prefix(seed=0)
    strange = {name: np.asfortranarray(array).astype(">f4") for name, array in prefix.tensors.items()}
    save(Prefix(prefix.manifest, strange), tmp_path / "x")
    save(prefix, tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_loaded_arrays_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        next(iter(load(GOLDEN).tensors.values()))[0] = 0


def test_keys_and_values_by_layer() -> None:
    prefix = small_prefix()
    pairs = key_values(prefix)
    assert [(key.shape, value.shape) for key, value in pairs] == [((2, 3, 4), (2, 3, 4))] * 2
    assert pairs[1][1] is prefix.tensors["decoder.self.layers.1.value"]
    with pytest.raises(InputError, match=r"expected keys and values for decoder\.cross; found key_value_prefix"):
        key_values(prefix, attention="cross")


def changed(prefix: Prefix, name: str, array: Any) -> Prefix:
    tensors = {**prefix.tensors, name: array}
    return Prefix(prefix.manifest, {key: value for key, value in tensors.items() if value is not None})


KEY = "decoder.self.layers.0.key"


@pytest.mark.parametrize(
    ("name", "array", "told"),
    [
        (KEY, None, f"expected the tensor {KEY}; found none"),
        (
            "decoder.self.layers.2.key",
            np.zeros((2, 3, 4), np.float32),
            "expected no tensor 'decoder.self.layers.2.key'",
        ),
        (KEY, np.zeros((3, 2, 4), np.float32), "of shape [2, 3, 4]; found [3, 2, 4]"),
        (KEY, np.zeros((2, 3, 4), np.float16), "keys and values of one dtype"),
        (KEY, np.zeros((2, 3, 4), np.float64), "expected float32, float16 or bfloat16; found float64"),
        (KEY, np.full((2, 3, 4), np.nan, np.float32), f"expected finite numbers in {KEY}; found NaN or Infinity"),
        (KEY, np.full((2, 3, 4), np.inf, np.float32), f"expected finite numbers in {KEY}; found NaN or Infinity"),
    ],
)
def test_what_breaks_the_specification_is_neither_written_nor_read(
    name: str, array: Any, told: str, tmp_path: Path
) -> None:
    bad = changed(small_prefix(), name, array)
    with pytest.raises(FormatError) as caught:
        save(bad, tmp_path / "x")
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    write_unchecked(bad, tmp_path / "x")
    with pytest.raises(FormatError):
        load(tmp_path / "x")


def write_unchecked(prefix: Prefix, path: Path) -> None:
    """What a careless writer would write: everything as told, with a digest that agrees."""
    dtypes = {"float32": "F32", "float16": "F16", "float64": "F64"}
    tensors = {
        name: StoredTensor(dtypes[array.dtype.name], array.shape, array.tobytes())
        for name, array in prefix.tensors.items()
    }
    described = document(prefix.manifest)
    lines = [leaf_line(name, tensor.dtype, tensor.shape, (tensor.data,)) for name, tensor in tensors.items()]
    described["content"] = content_digest(lines, described)
    metadata = {"format": "pt", "prefixkit": canonical(described).decode()}
    path.write_bytes(b"".join(encode(tensors, metadata)))


@pytest.mark.parametrize("place", [-1, -20])
def test_a_flipped_bit_in_the_data_is_found(place: int, tmp_path: Path) -> None:
    damaged = bytearray(GOLDEN.read_bytes())
    damaged[place] ^= 1
    (tmp_path / "x").write_bytes(damaged)
    with pytest.raises(FormatError, match="the digest of the content"):
        load(tmp_path / "x")
    assert compare(load(tmp_path / "x", verify=False), load(GOLDEN)) != []


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    edited = GOLDEN.read_bytes().replace(b" =>", b" >=")
    (tmp_path / "x").write_bytes(edited)
    with pytest.raises(FormatError, match="the digest of the content"):
        load(tmp_path / "x")


def test_no_byte_of_the_file_can_change_unnoticed(tmp_path: Path) -> None:
    whole = GOLDEN.read_bytes()
    for place in {*range(0, len(whole), 5), whole.index(b'"pt"') + 1, whole.index(b'"format"') + 1}:
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(FormatError):
            load(tmp_path / "x")


@pytest.mark.parametrize("metadata", [{"format": "pt", "more": "x"}, {"format": "tf"}, {}])
def test_metadata_outside_the_digest_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    header = read_header(GOLDEN)
    tensors = {
        name: StoredTensor(header.tensors[name].dtype, header.tensors[name].shape, data)
        for name, data in read_tensors(GOLDEN, header)
    }
    stored = {**metadata, "prefixkit": header.metadata["prefixkit"]}
    (tmp_path / "x").write_bytes(b"".join(encode(tensors, stored)))
    with pytest.raises(FormatError, match="expected the metadata format"):
        load(tmp_path / "x")


def test_one_line_names_the_first_problem_and_counts_the_rest(tmp_path: Path) -> None:
    header = GOLDEN.read_bytes().replace(b"layers.0.key", b"layers.7.key")
    (tmp_path / "x").write_bytes(header)
    with pytest.raises(FormatError) as caught:
        load(tmp_path / "x")
    assert str(caught.value) == (
        f"{tmp_path}/x /injections: expected no tensor 'decoder.self.layers.7.key'; found one (and 1 more): "
        f"`prefixkit inspect {tmp_path}/x` lists them"
    )


def test_a_diverged_metric_is_refused_in_words(tmp_path: Path) -> None:
    prefix = small_prefix()
    provenance = replace(prefix.manifest.provenance, metrics={"loss": float("nan")})
    with pytest.raises(FormatError, match="expected what JSON can hold"):
        save(Prefix(replace(prefix.manifest, provenance=provenance), prefix.tensors), tmp_path / "x")


def test_all_differences_are_told() -> None:
    ours, theirs = small_prefix(), small_prefix()
    assert compare(ours, theirs) == []
    backbone = replace(theirs.manifest.backbone, name="other", revision="main")
    theirs = Prefix(replace(theirs.manifest, backbone=backbone), {**theirs.tensors, "more": np.zeros(1)})
    theirs.tensors[KEY] = theirs.tensors[KEY] + 0.5
    del theirs.tensors["decoder.self.layers.1.value"]
    assert [str(difference) for difference in compare(ours, theirs)] == [
        "/backbone/name: 'tiny' and 'other'",
        "/backbone/revision: nothing and 'main'",
        "decoder.self.layers.0.key: numbers that differ by at most 0.5",
        "decoder.self.layers.1.value: float32 [2, 3, 4] and nothing",
        "more: nothing and float64 [1]",
    ]


IDENTITY = small_prefix().manifest.backbone


def test_the_own_backbone_matches_at_every_level() -> None:
    assert matches(small_prefix(), IDENTITY) == "weights"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(IDENTITY, weights_hash="b3t-v1:" + "0" * 64), "(checked weights; geometry and config agree)"),
        (replace(IDENTITY, config_hash="b3-v1:" + "0" * 64), "(checked config; geometry agrees)"),
        (replace(IDENTITY, family="llama"), "architecture gpt2; found llama (checked config; geometry agrees)"),
        (replace(IDENTITY, stacks={"decoder": IDENTITY.stacks["decoder"][:1]}), "layers 2; found 1 (checked geometry)"),
        (replace(IDENTITY, stacks={"decoder": IDENTITY.stacks["decoder"] * 2}), "layers 2; found 4 (checked geometry)"),
        (replace(IDENTITY, hidden_size=16), "hidden size 8; found 16 (checked geometry)"),
        (
            replace(IDENTITY, stacks={"decoder": (LayerGeometry(kv_heads=4, key_dim=2, value_dim=2),) * 2}),
            "decoder layer 0 2 heads of 4 and 4; found 4 heads of 2 and 2 (checked geometry)",
        ),
        (
            replace(IDENTITY, stacks={"decoder": (replace(IDENTITY.stacks["decoder"][0], window=8),) * 2}),
            "decoder layer 0 full attention; found window 8 (checked config",
        ),
        (
            replace(IDENTITY, stacks={"encoder": IDENTITY.stacks["decoder"]}),
            "stacks decoder; found encoder (checked geometry)",
        ),
    ],
)
def test_another_backbone_is_refused_in_one_line(other: BackboneIdentity, told: str) -> None:
    with pytest.raises(MismatchError) as caught:
        matches(small_prefix(), other)
    assert told in str(caught.value)
    assert str(caught.value).startswith("prefix for tiny on tiny: expected ")
    assert "\n" not in str(caught.value)


def test_a_mismatch_can_be_allowed_but_not_of_shapes() -> None:
    prefix = small_prefix()
    weights = replace(IDENTITY, weights_hash="b3t-v1:" + "0" * 64)
    assert matches(prefix, weights, allow_mismatch=True) == "config"
    assert matches(prefix, replace(weights, family="llama"), allow_mismatch=True) == "geometry"
    with pytest.raises(MismatchError):
        matches(prefix, replace(IDENTITY, hidden_size=16), allow_mismatch=True)


def test_a_refused_save_says_what_to_do(tmp_path: Path) -> None:
    bad = changed(small_prefix(), KEY, np.full((2, 3, 4), np.nan, np.float32))
    with pytest.raises(FormatError, match="NaN or Infinity: correct it and save it again; nothing was written"):
        save(bad, tmp_path / "x")


def test_another_tokenizer_is_a_level_of_its_own() -> None:
    hashes = ["b3-v1:" + digit * 64 for digit in "01"]
    prefix = small_prefix()
    trained = replace(IDENTITY, tokenizer_hash=hashes[0])
    prefix = Prefix(replace(prefix.manifest, backbone=trained), prefix.tensors)
    assert matches(prefix, trained) == "weights"
    assert matches(prefix, IDENTITY) == "weights"
    other = replace(IDENTITY, tokenizer_hash=hashes[1])
    told = f"tokenizer hash {hashes[0]}; found {hashes[1]} (checked tokenizer; geometry, config and weights agree); use"
    with pytest.raises(MismatchError, match=re.escape(told)):
        matches(prefix, other)
    assert matches(prefix, other, allow_mismatch=True) == "weights"
    with pytest.raises(MismatchError, match="checked tokenizer; geometry and config agree"):
        matches(prefix, replace(other, weights_hash=None))


def test_what_a_file_does_not_know_is_not_compared() -> None:
    prefix = small_prefix()
    manifest = replace(prefix.manifest, backbone=replace(IDENTITY, weights_hash=None))
    assert matches(Prefix(manifest, prefix.tensors), IDENTITY) == "config"
    manifest = replace(prefix.manifest, backbone=replace(IDENTITY, weights_hash=None, config_hash=None))
    assert matches(Prefix(manifest, prefix.tensors), IDENTITY) == "geometry"
