"""Folders of other runtimes with two prefixes, each made once a test run, and what PyTorch says of the same texts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.genai import export_genai
from prefixkit.bridges.onnx_adapter import export_onnx_adapter
from prefixkit.injections import KeyValuePrefix, injection
from prefixkit.prefix import Array, Prefix
from tests.exported import backbone, exported, random_prefix, root
from tests.ragged import alone

STEPS = 12
TOLERANCE = 1e-4
EFFECT = 1.0


@cache
def prefixes(family: str) -> dict[str, Prefix]:
    """Two prefixes of other numbers and lengths, by the names of their adapters."""
    identity = load_backbone(backbone(family)).identity
    return {"say": random_prefix(identity), "other": random_prefix(identity, seed=5, length=4, task=None)}


@cache
def genai(family: str) -> Path:
    """What `export --genai` writes for the first of `prefixes`, and the second as a further adapter in it."""

    def copied(prefix: Prefix, backbone: str, out_dir: Path, **options: str) -> None:
        copytree(exported(family).folder, out_dir)

    folder, both = root() / f"genai-{family}", prefixes(family)
    with pytest.MonkeyPatch.context() as patched:
        # The same export that other tests have, of the same prefix.
        patched.setattr("prefixkit.export.onnx.export_onnx", copied)
        export_genai(both["say"], folder, backbone=str(backbone(family)))
    export_onnx_adapter(both["other"], folder / "adapters" / "other.onnx_adapter")
    return folder


@cache
def model(family: str) -> PreTrainedModel:
    """The backbone in PyTorch."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(backbone(family), dtype=torch.float32).eval()
    return loaded


def texts() -> list[list[int]]:
    """Rows of 5, 9 and 7 tokens; none of them pads anything."""
    generator = np.random.default_rng(3)
    return [generator.integers(4, 320, length).tolist() for length in (5, 9, 7)]


@torch.no_grad()
def in_pytorch(family: str, prefix: Prefix | None, text: list[int]) -> tuple[list[int], Array]:
    """STEPS greedy tokens behind `text`, and logits [text + STEPS - 1, vocab], the row alone, without padding."""
    cached = None if prefix is None else injection(prefix)
    assert cached is None or isinstance(cached, KeyValuePrefix)
    ids = torch.tensor(text)
    for _ in range(STEPS):
        logits = alone(model(family), ids, cached)
        ids = torch.cat([ids, logits[-1:].argmax(-1)])
    return ids[len(text) :].tolist(), logits.numpy()
