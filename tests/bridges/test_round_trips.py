"""One prefix through every runtime that gives it back: the same numbers, and from then on the same content digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.catalogue import RUNTIMES, chosen, function, runtime
from prefixkit.bridges.transformers_cache import dynamic_cache
from prefixkit.bridges.transformers_capture import import_cache
from prefixkit.prefix import Prefix, content_of
from tests.exported import backbone, random_prefix

Trip = Callable[[Prefix, Path], Prefix]
EXACT = {"llama-cpp": {"dtype": "float32"}}
"""Settings without which numbers are rounded."""
KEYS_AND_VALUES = [row.name for row in RUNTIMES if row.exporter and row.importer and row.name != "google-prompt"]


def through_file(name: str, prefix: Prefix, folder: Path) -> Prefix:
    row = runtime(name)
    assert row.exporter is not None
    assert row.importer is not None
    output = folder / "carried.safetensors"
    function(row.exporter)(prefix, output, **chosen(row, EXACT.get(name, {})))
    back: Prefix = function(row.importer)(output, backbone=str(backbone("llama")))
    return back


def through_cache(prefix: Prefix, folder: Path) -> Prefix:
    model = AutoModelForCausalLM.from_pretrained(backbone("llama"))
    return import_cache(dynamic_cache(prefix, model), model)


TRIPS: dict[str, Trip] = {
    **{name: partial(through_file, name) for name in KEYS_AND_VALUES},
    "transformers": through_cache,
}


def test_there_are_five_of_them() -> None:
    assert set(TRIPS) == {"peft", "cartridges", "mlx", "llama-cpp", "transformers"}


@pytest.mark.parametrize("name", TRIPS)
def test_what_comes_back_is_what_left(name: str, tmp_path: Path) -> None:
    prefix = random_prefix(load_backbone(backbone("llama")).identity, task=None)
    trip = TRIPS[name]
    back = trip(prefix, tmp_path)
    # What a runtime has no place for is known: where it came from, and slots that it does not know as frozen.
    manifest = replace(prefix.manifest, injections=back.manifest.injections)
    assert content_of(Prefix(manifest, back.tensors)) == content_of(replace(prefix, manifest=manifest))
    assert back.manifest.injections[0].positions == prefix.manifest.injections[0].positions
    assert back.manifest.backbone == prefix.manifest.backbone
    again = trip(back, tmp_path)
    assert content_of(again) == content_of(back)


def test_a_digest_tells_numbers_apart() -> None:
    prefix = random_prefix(load_backbone(backbone("llama")).identity, task=None)
    name, array = next(iter(prefix.tensors.items()))
    other = Prefix(prefix.manifest, {**prefix.tensors, name: np.nextafter(array, np.float32(9))})
    assert content_of(other) != content_of(prefix)
