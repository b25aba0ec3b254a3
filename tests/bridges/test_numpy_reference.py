"""The specification in code computes what `transformers` computes with the prefix as the beginning of its cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges import numpy_reference
from prefixkit.bridges.numpy_reference import logits
from prefixkit.errors import FormatError
from prefixkit.format.manifest import Manifest, Positions, Provenance
from prefixkit.injections import EmbeddingPrompt, KeyValuePrefix, embedding_prompt, key_value_prefix, records_of
from prefixkit.prefix import Prefix, load, save
from tests.architectures import tiny
from tests.ragged import alone, prompts, random_prefix

Folder = Callable[..., Path]
TOLERANCE = 1e-4
EFFECT = 1.0
LENGTH = 6
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def model_in(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def saved(path: Path, folder: Path, injected: KeyValuePrefix | EmbeddingPrompt, dtype: Any = None) -> Path:
    provenance = Provenance(method="random", prefixkit="0.1.0")
    identity = load_backbone(folder).identity
    manifest = Manifest(backbone=identity, injections=records_of(injected), provenance=provenance)
    arrays = {name: array.astype(dtype or array.dtype) for name, array in injected.arrays().items()}
    save(Prefix(manifest, arrays), path)
    return path


def scaled(prefix: KeyValuePrefix, by: float = 3.0) -> KeyValuePrefix:
    return replace(prefix, keys=tuple(key * by for key in prefix.keys), values=tuple(v * by for v in prefix.values))


@torch.no_grad()
def expected(model: PreTrainedModel, row: torch.Tensor, prefix: KeyValuePrefix | None) -> np.ndarray[Any, Any]:
    return alone(model, row, prefix).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix(family: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder, row = backbone_folder(family), prompts()[1]
    model = model_in(folder)
    prefix = scaled(random_prefix(model, LENGTH))
    file = saved(tmp_path / "p.safetensors", folder, prefix)
    found, bare = logits(folder, row.tolist(), file), logits(folder, row.tolist())
    assert np.abs(found - expected(model, row, prefix)).max() <= TOLERANCE
    assert np.abs(bare - expected(model, row, None)).max() <= TOLERANCE
    assert np.abs(found - bare).max() > EFFECT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_prefix_of_half_the_bits(dtype: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder, row = backbone_folder("llama"), prompts()[1]
    model = model_in(folder)
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    file = saved(tmp_path / "p.safetensors", folder, scaled(random_prefix(model, LENGTH)), kind)
    stored = key_value_prefix(load(file))
    whole = replace(
        stored, keys=tuple(key.float() for key in stored.keys), values=tuple(v.float() for v in stored.values)
    )
    found = logits(folder, row.tolist(), file)
    assert np.abs(found - expected(model, row, whole)).max() <= TOLERANCE
    assert np.abs(found - logits(folder, row.tolist())).max() > EFFECT


def test_where_text_starts_is_what_the_file_says(backbone_folder: Folder, tmp_path: Path) -> None:
    folder, row = backbone_folder("llama"), prompts()[1]
    prefix = scaled(random_prefix(model_in(folder), LENGTH))
    elsewhere = replace(prefix, positions=Positions(text_start=0, prefix_takes_positions=False))
    behind = logits(folder, row.tolist(), saved(tmp_path / "a", folder, prefix))
    moved = logits(folder, row.tolist(), saved(tmp_path / "b", folder, elsewhere))
    assert np.abs(behind - moved).max() > EFFECT
    with torch.no_grad():
        oracle = attach(model_in(folder), elsewhere)(input_ids=row[None]).logits[0].numpy()
    assert np.abs(moved - oracle).max() <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_prompt(family: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder, row = backbone_folder(family), prompts()[1]
    model = model_in(folder)
    vectors = torch.randn(LENGTH, 64, generator=torch.Generator().manual_seed(3)) * 3
    prompt = EmbeddingPrompt(embeddings=vectors, positions=Positions(text_start=LENGTH))
    file = saved(tmp_path / "p", folder, prompt)
    assert torch.equal(embedding_prompt(load(file)).embeddings, vectors)
    found = logits(folder, row.tolist(), file)
    with torch.no_grad():
        embedded = torch.cat([vectors, model.get_input_embeddings()(row)])[None]
        oracle = model(inputs_embeds=embedded).logits[0, LENGTH:].numpy()
    assert np.abs(found - oracle).max() <= TOLERANCE
    assert np.abs(found - logits(folder, row.tolist())).max() > EFFECT


def test_weights_in_shards_and_in_half_the_bits(tmp_path: Path) -> None:
    tiny("qwen2").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    row = prompts()[1]
    assert np.abs(logits(tmp_path, row.tolist()) - expected(model_in(tmp_path), row, None)).max() <= TOLERANCE


def test_what_is_not_written_down_is_refused(backbone_folder: Folder, tmp_path: Path) -> None:
    for family in ("gpt2", "mistral_window", "gemma3"):
        with pytest.raises(FormatError, match="expected a Llama, Mistral, Qwen2 or Qwen3 with plain RoPE"):
            logits(backbone_folder(family), [1, 2])
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    tiny("llama", rope_parameters=scaling).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="plain RoPE"):
        logits(tmp_path, [1, 2])
    folder = backbone_folder("llama")
    vectors = torch.zeros(2, 64)
    after = EmbeddingPrompt(embeddings=vectors, positions=Positions(text_start=2), placement="after_first")
    with pytest.raises(FormatError, match="expected a prefix or a prompt before the text of a decoder"):
        logits(folder, [1, 2], saved(tmp_path / "p", folder, after))


def test_it_is_short_and_needs_numpy_alone() -> None:
    source = Path(numpy_reference.__file__)
    assert len(source.read_text(encoding="utf-8").splitlines()) < 100
    program = f"import sys; import {numpy_reference.__name__}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "numpy" in loaded
    assert {"torch", "transformers", "safetensors", "ml_dtypes", "onnxruntime"}.isdisjoint(loaded)
