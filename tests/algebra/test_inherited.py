"""What a derived prefix says of its backbone and training: only what all its parents say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from prefixkit.algebra import Derived, average, cast, compose, cut
from prefixkit.errors import MismatchError
from prefixkit.prefix import Prefix
from tests.prefixes import small_prefix


def stating(seed: int, config: dict[str, Any], **backbone: Any) -> Prefix:
    manifest = small_prefix(seed=seed).manifest
    return Prefix(
        replace(
            manifest,
            backbone=replace(manifest.backbone, **backbone),
            provenance=replace(manifest.provenance, config=config),
        ),
        small_prefix(seed=seed).tensors,
    )


@pytest.mark.parametrize("operation", [compose, average])
def test_only_what_all_parents_state_is_stated(operation: Callable[[list[Prefix]], Derived]) -> None:
    bound, unbound = stating(1, {}), stating(2, {}, weights_hash=None)
    for parts in ([bound, unbound], [unbound, bound], [bound, unbound, bound]):
        made = operation(parts)
        backbone = made.prefix.manifest.backbone
        assert (backbone.weights_hash, backbone.config_hash) == (None, bound.manifest.backbone.config_hash)
        assert made.notes[-1].startswith("weights of the backbone: not every part states a hash")
    both = operation([bound, bound])
    assert both.prefix.manifest.backbone == bound.manifest.backbone
    assert not any("hash" in note for note in both.notes)
    stranger = stating(3, {}, weights_hash="b3t-v1:" + "e" * 64)
    with pytest.raises(MismatchError, match="prefix 3: expected the backbone of prefix 2, weights hash"):
        operation([unbound, bound, stranger])


@pytest.mark.parametrize("operation", [compose, average])
def test_rounded_weights_of_training_are_remembered(operation: Callable[[list[Prefix]], Derived]) -> None:
    small, plain = stating(1, {"quantize": "nf4"}), stating(2, {})
    made = operation([small, small])
    assert made.prefix.manifest.provenance.config["quantize"] == "nf4"
    assert not any("nf4" in note for note in made.notes)
    for derived in (cut(made.prefix, 0, 1), cast(made.prefix, "bfloat16")):
        assert derived.prefix.manifest.provenance.config["quantize"] == "nf4"
    mixed = operation([small, plain])
    assert "quantize" not in mixed.prefix.manifest.provenance.config
    assert mixed.notes[-1].startswith("trained on backbones of nf4 weights and weights as stored; the result does not")
    assert "quantize" not in operation([plain, plain]).prefix.manifest.provenance.config
