"""Slices, means, casts and differences, number by number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prefixkit.algebra import apart, average, cast, cut
from prefixkit.algebra.slice import bounds, spans_of
from prefixkit.errors import ConfigError, FormatError, InputError
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.prefix import Prefix, content_of, load, save
from tests.prefixes import small_prefix

KEY = "decoder.self.layers.0.key"


def changed(prefix: Prefix, **changes: Any) -> Prefix:
    (record,) = prefix.manifest.injections
    return Prefix(replace(prefix.manifest, injections=(replace(record, **changes),)), prefix.tensors)


@pytest.mark.parametrize("text", [":", ":3", "3:", "2:5", "-3:", "1:-1", " 0 : 8", "-20:", "3:20", "-20:-6"])
def test_bounds_are_read_as_python_reads_them(text: str) -> None:
    start, stop = bounds(text)
    begin, _, end = text.partition(":")
    expected = list(range(8))[slice(*(int(part) if part else None for part in (begin, end)))]
    (span,) = spans_of(small_prefix(length=8), start, stop)
    assert list(span) == expected


@pytest.mark.parametrize("text", ["3", "1:2:3", "a:b", "", "1.5:3", "\u0661:\u0663", "1_0:", "--1:", "9" * 5000 + ":"])
def test_other_bounds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected START:STOP; found"):
        bounds(text)


@pytest.mark.parametrize(("start", "stop", "shown"), [(2, 2, "2:2"), (2, 1, "2:1"), (3, None, "3:"), (None, -3, ":-3")])
def test_slots_that_are_not_there(start: int | None, stop: int | None, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"slice: decoder.self: expected some of 3 slots; found none in {shown}$"):
        cut(small_prefix(), start, stop)


def test_everything_is_judged_before_anything_is_moved() -> None:
    one = small_prefix()
    backbone = replace(one.manifest.backbone, family="llama", rope={"rope_type": "default"})
    head = InjectionRecord(kind="task_head", labels=2, reads="first")
    manifest = replace(one.manifest, backbone=backbone, injections=(*one.manifest.injections, head), task=None)
    with_head = Prefix(manifest, {**one.tensors, "head.weight": np.ones((2, 8)), "head.bias": np.ones(2)})
    with pytest.raises(
        ConfigError, match="slice: expected keys and values or prompts before the text; found task_head"
    ):
        cut(with_head, 1, 3)


def test_a_slice_says_so(tmp_path: Path) -> None:
    whole = changed(small_prefix(seed=1, length=6), frozen_slots=3)
    made = cut(whole, 2, 5).prefix
    save(made, tmp_path / "p")
    stored = load(tmp_path / "p")
    (record,) = stored.manifest.injections
    assert (record.length, record.frozen_slots, record.positions) == (3, 1, Positions(text_start=3))
    for name, array in whole.tensors.items():
        assert stored.tensors[name].tobytes() == array[:, 2:5].tobytes()
    provenance = stored.manifest.provenance
    assert provenance.config == {"operation": "slice", "slots": [[2, 5]], "keys_turned": False}
    assert provenance.parents == (content_of(whole),)
    assert (provenance.method, provenance.seed, provenance.metrics) == ("prefix-tuning", 7, {})


def test_rotary_keys_from_the_middle_need_the_backbone() -> None:
    one = small_prefix(seed=1)
    backbone = replace(one.manifest.backbone, family="llama", rope={"rope_type": "default", "rope_theta": 1e4})
    rotary = Prefix(replace(one.manifest, backbone=backbone), one.tensors)
    assert cut(rotary, 0, 2).prefix.tensors[KEY].tobytes() == one.tensors[KEY][:, :2].tobytes()
    with pytest.raises(ConfigError, match="expected the backbone, to move them by -1 positions; found none"):
        cut(rotary, 1, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.1, 0.2, 0.7], [3, 0, 0]])
def test_the_mean_of_equals_is_the_same(dtype: Any, weights: list[float] | None) -> None:
    one = small_prefix(seed=4, dtype=dtype)
    made = average([one, one, one], weights).prefix
    assert made.manifest.injections == one.manifest.injections
    for name, array in one.tensors.items():
        assert made.tensors[name].dtype == array.dtype
        assert made.tensors[name].tobytes() == array.tobytes()


def test_a_mean_is_weighted_and_says_so(tmp_path: Path) -> None:
    one, two = small_prefix(seed=1), small_prefix(seed=2)
    made = save(average([one, two], [3, 1]).prefix, tmp_path / "p")
    assert np.abs(made.tensors[KEY] - (0.75 * one.tensors[KEY] + 0.25 * two.tensors[KEY])).max() <= 1e-6
    assert np.abs(made.tensors[KEY] - two.tensors[KEY]).max() > 1
    provenance = load(tmp_path / "p").manifest.provenance
    assert provenance.config == {"operation": "average", "weights": [0.75, 0.25]}
    assert provenance.parents == (content_of(one), content_of(two))


def test_heads_are_averaged_too() -> None:
    one = small_prefix()
    head = InjectionRecord(kind="task_head", labels=2, reads="first")
    manifest = replace(one.manifest, injections=(*one.manifest.injections, head), task=None)
    parts = [
        Prefix(manifest, {**one.tensors, "head.weight": np.full((2, 8), number), "head.bias": np.full(2, number)})
        for number in (np.float32(1), np.float32(4))
    ]
    made = average(parts)
    assert made.prefix.tensors["head.weight"].tolist() == [[2.5] * 8] * 2
    assert made.notes == ()


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="average: weights: expected 2 numbers from 0, not all of them 0"):
        average([small_prefix(), small_prefix()], weights)


def test_prefixes_that_have_no_mean() -> None:
    one = small_prefix()
    for other, told in (
        (small_prefix(length=4), "average: prefix 2: key_value_prefix: expected length 3, as in the first; found 4"),
        (
            changed(one, positions=Positions(text_start=0, prefix_takes_positions=False)),
            "expected positions with text from 3 and a prefix that takes positions, as in the first; "
            "found with text from 0 and a prefix that takes none",
        ),
        (small_prefix(dtype=np.float16), "`prefixkit cast --dtype float32` it first"),
    ):
        with pytest.raises(ConfigError) as caught:
            average([one, other])
        assert told in str(caught.value)
    ragged = Prefix(one.manifest, {**one.tensors, KEY: np.zeros((2, 3, 5), np.float32)})
    with pytest.raises(ConfigError, match=r"expected tensors of one shape; found \[2, 3, 4\] and \[2, 3, 5\]"):
        average([one, ragged])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_and_back(dtype: str, tmp_path: Path) -> None:
    # Quarters below 16 are exact in either.
    one = small_prefix()
    narrow = cast(one, dtype)
    assert narrow.notes == ("no number changed",)
    save(narrow.prefix, tmp_path / "narrow")
    back = cast(load(tmp_path / "narrow"), "float32").prefix
    for name, array in one.tensors.items():
        assert back.tensors[name].dtype == np.float32
        assert back.tensors[name].tobytes() == array.tobytes()
    assert back.manifest.provenance.config == {"operation": "cast", "dtype": "float32"}
    assert back.manifest.provenance.parents == (content_of(narrow.prefix),)
    assert narrow.prefix.manifest.provenance.parents == (content_of(one),)
    assert back.manifest.task == one.manifest.task


def test_a_cast_says_what_rounding_did() -> None:
    one = small_prefix()
    tensors = {**one.tensors, KEY: np.full((2, 3, 4), 1.0009765625 + 2**-12, np.float32)}
    tensors[KEY][0, 0, 0] = 1e-9
    made = cast(Prefix(one.manifest, tensors), "float16")
    assert made.notes == ("numbers moved by at most 0.000244 in rounding; 1 too small for it became 0",)
    assert cast(made.prefix, "float16").prefix is made.prefix
    assert "float16 already" in cast(made.prefix, "float16").notes[0]


def test_numbers_that_do_not_fit() -> None:
    one = small_prefix()
    tensors = {**one.tensors, KEY: np.full((2, 3, 4), -7e4, np.float32)}
    with pytest.raises(FormatError) as caught:
        cast(Prefix(one.manifest, tensors), "float16")
    told = f"cast: {KEY}: expected numbers up to 65504 for float16; found 70000; use bfloat16, whose range is float32's"
    assert told in str(caught.value)
    tensors[KEY][:] = 65519
    assert cast(Prefix(one.manifest, tensors), "float16").prefix.tensors[KEY].max() == 65504
    tensors[KEY][:] = 3.4e38
    with pytest.raises(FormatError, match=r"for bfloat16; found 3\.4e\+38; keep it in float32"):
        cast(Prefix(one.manifest, tensors), "bfloat16")
    with pytest.raises(ConfigError, match="expected float16, bfloat16, float32; found 'int8'"):
        cast(one, "int8")


def test_how_far_tensors_are_apart() -> None:
    one = small_prefix(seed=1)
    assert list(apart(one, one)) == []
    tensors = {**one.tensors, KEY: one.tensors[KEY] * 3}
    (found,) = apart(one, Prefix(one.manifest, tensors))
    off = 2 * np.abs(one.tensors[KEY].astype(np.float64))
    assert found.name == KEY
    assert abs(found.max - off.max()) < 1e-6
    assert abs(found.mean - off.mean()) < 1e-6
    assert found.cosine is not None
    assert abs(found.cosine - 1) < 1e-6
    tensors[KEY] = np.zeros_like(tensors[KEY])
    assert next(apart(one, Prefix(one.manifest, tensors))).cosine is None


def test_nothing_is_saved_that_breaks_the_format(tmp_path: Path) -> None:
    made = cut(small_prefix(), 0, 2).prefix
    with pytest.raises(InputError):
        save(made, tmp_path / "none" / "p")
    assert list(tmp_path.iterdir()) == []
