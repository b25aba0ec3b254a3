"""PEFT's prompts there and back, of decoders and of encoder-decoders, with PEFT itself as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.peft import export_peft, import_peft
from prefixkit.cli import run
from prefixkit.errors import FormatError, MismatchError
from prefixkit.injections import embedding_prompt
from prefixkit.prefix import Prefix, load, save
from tests import encoder_decoders
from tests.ragged import padded, prompts

pytestmark = [
    # PEFT 0.21 reads a property that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # `generate` gives it positions; it counts the prompt's itself.
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

Folder = Callable[..., Path]
LENGTH = 5
TOLERANCE = 1e-5
EFFECT = 1.0
WEIGHTS = "adapter_model.safetensors"
KINDS = {
    "PROMPT_TUNING": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH),
    "P_TUNING": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=LENGTH, encoder_hidden_size=16),
}


def decoder_in(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pair_in(folder: Path) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def made_by_peft(model: PreTrainedModel, folder: Path, kind: str, task: str = "CAUSAL_LM") -> Path:
    """What PEFT saves of a prompt, its numbers then scaled to matter."""
    torch.manual_seed(7)
    get_peft_model(model, KINDS[kind](task)).save_pretrained(folder)
    stored = load_file(folder / WEIGHTS)["prompt_embeddings"]
    save_file({"prompt_embeddings": stored * np.float32(3 / stored.std())}, folder / WEIGHTS, {"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_a_decoder(kind: str, family: str, backbone_folder: Folder, tmp_path: Path) -> None:
    backbone = backbone_folder(family)
    folder = made_by_peft(decoder_in(backbone), tmp_path / "peft", kind)
    prefix = save(import_peft(folder, backbone=backbone), tmp_path / "p")
    export_peft(load(tmp_path / "p"), tmp_path / "back")
    before, after = (load_file(place / WEIGHTS)["prompt_embeddings"] for place in (folder, tmp_path / "back"))
    assert before.dtype == after.dtype
    assert before.tobytes() == after.tobytes()
    said, says = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / "back"))
    assert says.pop("peft_type") == "PROMPT_TUNING"
    assert said.items() >= {name: says[name] for name in says if name != "base_model_name_or_path"}.items()
    assert prefix.manifest.backbone == load_backbone(backbone).identity
    assert "lost" not in prefix.manifest.provenance.config
    row = prompts()[1][None]
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    bare = logits(decoder_in(backbone), **inputs)
    ours = attach(decoder_in(backbone), prefix)
    for place in (folder, tmp_path / "back"):
        theirs = PeftModel.from_pretrained(decoder_in(backbone), place).eval()
        expected = logits(theirs, **inputs)[:, LENGTH:]
        assert (logits(ours, **inputs) - expected).abs().max() <= TOLERANCE
        assert (expected - bare).abs().max() > EFFECT
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_prefixkit_to_peft_and_back(dtype: Any, backbone_folder: Folder, tmp_path: Path) -> None:
    backbone = backbone_folder("llama")
    folder = made_by_peft(decoder_in(backbone), tmp_path / "peft", "P_TUNING")
    imported = import_peft(folder, backbone=backbone)
    prefix = Prefix(imported.manifest, {name: array.astype(dtype) for name, array in imported.tensors.items()})
    export_peft(prefix, tmp_path / "out")
    back = import_peft(tmp_path / "out", backbone=backbone)
    provenance = replace(prefix.manifest.provenance, method="prompt-tuning")
    assert back.manifest == replace(prefix.manifest, provenance=provenance)
    assert back.tensors["prompt.embeddings"].tobytes() == prefix.tensors["prompt.embeddings"].tobytes()


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_an_encoder_decoder(kind: str, family: str, tmp_path: Path) -> None:
    backbone = encoder_decoders.folder_of(family, tmp_path / "model")
    folder = made_by_peft(pair_in(backbone), tmp_path / "peft", kind, "SEQ_2_SEQ_LM")
    prefix = save(import_peft(folder, backbone=backbone), tmp_path / "p")
    assert prefix.manifest.backbone == load_backbone(backbone).identity
    stored = load_file(folder / WEIGHTS)["prompt_embeddings"]
    assert prefix.manifest.provenance.config["lost"] == ["PEFT reads 5 of its 10 vectors; the others are left behind"]
    export_peft(prefix, tmp_path / "back")
    again = load_file(tmp_path / "back" / WEIGHTS)["prompt_embeddings"]
    assert again.tobytes() == stored[:LENGTH].tobytes()
    batch = padded(prompts(), "right")
    batch["decoder_input_ids"] = torch.stack([row[:5] for row in prompts()])
    bare = logits(pair_in(backbone), **batch)
    ours = load_backbone(backbone)
    with ours.injected(embedding_prompt(prefix)) as model, torch.no_grad():
        vectors = embedding_prompt(prefix).embeddings.expand(3, -1, -1)
        embedded = torch.cat([vectors, model.get_input_embeddings()(batch["input_ids"])], dim=1)
        mask = torch.cat([torch.ones(3, LENGTH), batch["attention_mask"]], dim=1)
        found = model(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=batch["decoder_input_ids"]).logits
    for place in (folder, tmp_path / "back"):
        expected = logits(PeftModel.from_pretrained(pair_in(backbone), place).eval(), **batch)
        assert (found - expected).abs().max() <= TOLERANCE
        assert (expected - bare).abs().max() > EFFECT


def test_what_made_a_prompt_decides_nothing(backbone_folder: Folder, tmp_path: Path) -> None:
    """`method` is told, never acted on."""
    backbone, written = backbone_folder("llama"), []
    prefix = import_peft(made_by_peft(decoder_in(backbone), tmp_path / "peft", "P_TUNING"), backbone=backbone)
    for method in ("p-tuning", "prompt-tuning", "whatever"):
        provenance = replace(prefix.manifest.provenance, method=method)
        export_peft(Prefix(replace(prefix.manifest, provenance=provenance), prefix.tensors), tmp_path / method)
        written.append([(tmp_path / method / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)])
    assert written[0] == written[1] == written[2]


def test_a_prompt_as_long_as_the_context_is_refused(backbone_folder: Folder, tmp_path: Path) -> None:
    backbone = backbone_folder("llama")
    folder = made_by_peft(decoder_in(backbone), tmp_path / "peft", "PROMPT_TUNING")
    save_file({"prompt_embeddings": np.zeros((128, 64), np.float32)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(MismatchError, match=rf"^{folder}: expected fewer than the 128 positions of .*; found 128"):
        import_peft(edit(folder, num_virtual_tokens=128), backbone=backbone)


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_prompts_that_are_refused(backbone_folder: Folder, tmp_path: Path) -> None:
    backbone = backbone_folder("llama")
    folder = made_by_peft(decoder_in(backbone), tmp_path / "peft", "PROMPT_TUNING")
    for changes, told in (
        ({"token_dim": 32}, r"prompt_embeddings of \[5, 32\], as adapter_config.json says, in F32, F16 or BF16; found"),
        ({"token_dim": None}, "expected token_dim, a whole number from 1; found None"),
        ({"token_dim": 64, "num_virtual_tokens": 4}, r"of \[4, 64\]"),
        ({"num_virtual_tokens": 5, "peft_type": "MULTITASK_PROMPT_TUNING"}, "found 'MULTITASK_PROMPT_TUNING'"),
    ):
        with pytest.raises(FormatError, match=told):
            import_peft(edit(folder, **changes), backbone=backbone)
    edit(folder, peft_type="PROMPT_TUNING")
    pair = encoder_decoders.folder_of("t5", tmp_path / "model")
    with pytest.raises(MismatchError, match="expected a decoder as backbone; found an encoder-decoder"):
        import_peft(folder, backbone=pair)
    narrow = made_by_peft(pair_in(pair), tmp_path / "narrow", "PROMPT_TUNING", "SEQ_2_SEQ_LM")
    with pytest.raises(MismatchError, match="vectors of the backbone's width 48; found 64"):
        import_peft(narrow, backbone=encoder_decoders.folder_of("flan", tmp_path / "flan"))


def test_the_command_says_what_was_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = encoder_decoders.folder_of("bart", tmp_path / "model")
    folder = made_by_peft(pair_in(backbone), tmp_path / "peft", "PROMPT_TUNING", "SEQ_2_SEQ_LM")
    assert run(["import", "--peft", str(folder), "--backbone", str(backbone), "-o", str(tmp_path / "p")]) == 0
    assert "warning: PEFT reads 5 of its 10 vectors; the others are left behind" in capsys.readouterr().err
