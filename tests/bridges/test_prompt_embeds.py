"""Soft prompts as the vectors that vLLM and SGLang take, read back as these servers read them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.load import load_decoder
from prefixkit.bridges.prompt_embeds import export_sglang, sglang_input_embeds, vllm_prompt_embeds
from prefixkit.bridges.vllm import export_vllm
from prefixkit.cli import run
from prefixkit.errors import FormatError
from prefixkit.prefix import Prefix, save
from tests.prefixes import small_prefix, soft_prompt

Folder = Callable[..., Path]
LENGTH, TOKENS = 5, list(range(40, 52))


def prompt(folder: Path, dtype: Any = np.float32) -> Prefix:
    return soft_prompt(load_decoder(folder).identity, length=LENGTH, seed=3, dtype=dtype)


def decoded(payload: str) -> Tensor:
    vectors: Tensor = torch.load(io.BytesIO(base64.b64decode(payload)), weights_only=True)
    return vectors


# Gemma scales its embeddings: the vectors are those after the scale.
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_vectors_are_the_whole_prompt(family: str, backbone_folder: Folder) -> None:
    prefix = prompt(backbone_folder(family))
    model = AutoModelForCausalLM.from_pretrained(backbone_folder(family), dtype=torch.float32).eval()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        bare = model(input_ids=torch.tensor([TOKENS])).logits
        for vectors in (
            decoded(vllm_prompt_embeds(prefix, TOKENS, embedding)),
            torch.tensor(json.loads(json.dumps(sglang_input_embeds(prefix, TOKENS, embedding)))),
        ):
            assert vectors.shape == (LENGTH + len(TOKENS), 64)
            found = model(inputs_embeds=vectors[None]).logits[:, LENGTH:]
            expected = attach(model, prefix)(input_ids=torch.tensor([TOKENS])).logits
            detach(model)
            assert (found - expected).abs().max() <= 1e-4
            assert (found - bare).abs().max() > 1


def test_files_hold_the_prompt_alone_and_say_so(backbone_folder: Folder, tmp_path: Path) -> None:
    prefix = prompt(backbone_folder("llama"))
    carried = export_vllm(prefix, tmp_path / "vllm")
    assert (decoded((tmp_path / "vllm").read_text()).numpy() == prefix.tensors["prompt.embeddings"]).all()
    assert "prefixkit.bridges.prompt_embeds.vllm_prompt_embeds" in carried.lost[0]
    carried = export_sglang(prefix, str(tmp_path / "sglang"))
    assert carried.output == tmp_path / "sglang"
    stored = json.loads((tmp_path / "sglang").read_text())["input_embeds"]
    assert (np.array(stored, np.float32) == prefix.tensors["prompt.embeddings"]).all()
    assert "prefixkit.bridges.prompt_embeds.sglang_input_embeds" in carried.lost[0]


def test_a_payload_is_no_larger_than_its_numbers(backbone_folder: Folder, tmp_path: Path) -> None:
    export_vllm(prompt(backbone_folder("llama"), np.float16), tmp_path / "half")
    assert (tmp_path / "half").stat().st_size < (LENGTH * 64 * 2 + 2048) * 4 / 3


def test_other_prefixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match="a soft prompt before the text of a decoder, as SGLang takes; found key_value"
    ):
        export_sglang(small_prefix(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_commands(backbone_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "prefix")
    save(prompt(backbone_folder("gpt2")), path)
    for runtime in ("vllm", "sglang"):
        assert run(["export", f"--{runtime}", path, "-o", str(tmp_path / runtime)]) == 0
        captured = capfd.readouterr()
        assert "warning: it holds the soft prompt alone" in captured.err
        assert "next: " in captured.out
