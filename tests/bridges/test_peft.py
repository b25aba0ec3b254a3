"""PEFT folders there and back, with PEFT itself as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import CartridgeConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.peft import export_peft, import_peft
from prefixkit.cli import run
from prefixkit.errors import BackboneError, FormatError, InputError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.prefix import Prefix, load, save
from tests.ragged import padded, prompts

# PEFT 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Folder = Callable[..., Path]
LENGTH = 5
TOLERANCE = 1e-5
EFFECT = 0.1
CONFIGS = {
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH),
    "projection": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_frozen_tokens=2),
}


def model_in(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def made_by_peft(backbone: Path, folder: Path, kind: str = "prefix") -> Path:
    torch.manual_seed(7)
    get_peft_model(model_in(backbone), CONFIGS[kind]()).save_pretrained(folder)
    return folder


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def assert_same_text(one: Any, other: Any, bare: PreTrainedModel) -> None:
    """Logits and greedy tokens of two models, and an effect of what both carry."""
    batch = padded(prompts(), "right")
    real = batch["attention_mask"].bool()
    assert (logits(one, batch) - logits(other, batch))[real].abs().max() <= TOLERANCE
    assert (logits(one, batch) - logits(bare, batch))[real].abs().max() > EFFECT
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    left = padded(prompts())
    assert torch.equal(one.generate(**left, **options), other.generate(**left, **options))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_import_computes_what_peft_computes(family: str, kind: str, backbone_folder: Folder, tmp_path: Path) -> None:
    backbone = backbone_folder(family)
    folder = made_by_peft(backbone, tmp_path / "peft", kind)
    theirs = PeftModel.from_pretrained(model_in(backbone), folder)
    ours = attach(model_in(backbone), import_peft(folder, backbone=backbone))
    assert_same_text(ours, theirs.eval(), model_in(backbone))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_to_prefixkit_and_back(family: str, kind: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder = made_by_peft(backbone_folder(family), tmp_path / "peft", kind)
    prefix = save(import_peft(folder, backbone=backbone_folder(family)), tmp_path / "prefix.safetensors")
    export_peft(load(tmp_path / "prefix.safetensors"), tmp_path / "back")
    before = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")["prompt_embeddings"]
    assert before.dtype == after.dtype
    assert before.tobytes() == after.tobytes()
    said, says = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / "back"))
    for name in ("peft_type", "num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens"):
        assert said[name] == says[name]
    assert said.get("num_frozen_tokens") == says.get("num_frozen_tokens")
    record = prefix.manifest.injections[0]
    assert record.length == LENGTH
    assert record.frozen_slots == (2 if kind == "cartridge" else 0)


@pytest.fixture
def imported(backbone_folder: Folder, tmp_path: Path) -> Prefix:
    """A prefix for the tiny Llama, with its weights hash."""
    return import_peft(made_by_peft(backbone_folder("llama"), tmp_path / "made"), backbone=backbone_folder("llama"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_prefixkit_to_peft_and_back(dtype: Any, imported: Prefix, backbone_folder: Folder, tmp_path: Path) -> None:
    prefix = Prefix(imported.manifest, {name: array.astype(dtype) for name, array in imported.tensors.items()})
    export_peft(prefix, tmp_path / "peft")
    back = import_peft(tmp_path / "peft", backbone=backbone_folder("llama"))
    assert back.manifest == prefix.manifest
    for name, array in prefix.tensors.items():
        assert back.tensors[name].dtype == array.dtype
        assert back.tensors[name].tobytes() == array.tobytes()
    theirs = PeftModel.from_pretrained(model_in(backbone_folder("llama")), tmp_path / "peft").eval()
    ours = attach(model_in(backbone_folder("llama")), prefix)
    assert_same_text(theirs, ours, model_in(backbone_folder("llama")))


def test_a_backbone_binds_the_file_to_its_weights(backbone_folder: Folder, imported: Prefix, tmp_path: Path) -> None:
    assert imported.manifest.backbone == load_backbone(backbone_folder("llama")).identity
    save(imported, tmp_path / "p")
    assert run(["inspect", str(tmp_path / "p"), "--backbone", str(backbone_folder("llama"))]) == 0
    with pytest.raises(MismatchError, match="weights hash"):
        attach(model_in(backbone_folder("llama", 1)), imported)


def test_without_a_backbone_the_named_configuration_is_all_that_is_known(
    backbone_folder: Folder, imported: Prefix, tmp_path: Path
) -> None:
    loose = import_peft(tmp_path / "made")
    known, bound = loose.manifest.backbone, imported.manifest.backbone
    assert known.weights_hash is None
    assert known.tokenizer_hash is None
    assert replace(bound, weights_hash=None, tokenizer_hash=None) == known
    attach(model_in(backbone_folder("llama", 1)), loose)
    with pytest.raises(MismatchError, match="layer"):
        attach(model_in(backbone_folder("gpt2")), loose)


def test_a_backbone_that_is_not_here(tmp_path: Path, imported: Prefix) -> None:
    edit(tmp_path / "made", base_model_name_or_path="prefixkit-tests/no-such-model")
    with pytest.raises(BackboneError, match="names prefixkit-tests/no-such-model, which is not here; give it with --b"):
        import_peft(tmp_path / "made")
    for name in ("a" * 5000, "nobody/" + "a" * 5000, "/" + "a" * 5000, "a\0b"):
        edit(tmp_path / "made", base_model_name_or_path=name)
        with pytest.raises(BackboneError, match="which is not here; give it with --backbone") as caught:
            import_peft(tmp_path / "made")
        assert len(str(caught.value)) < 400
    edit(tmp_path / "made", base_model_name_or_path=None)
    with pytest.raises(BackboneError, match="names none"):
        import_peft(tmp_path / "made")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"peft_type": "LORA"},
            "expected peft_type PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING or P_TUNING; found 'LORA'",
        ),
        ({"peft_type": "CPT"}, "found 'CPT'"),
        ({"peft_type": None}, "found None"),
        ({"peft_type": ["PREFIX_TUNING"]}, "found ['PREFIX_TUNING']"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "expected num_transformer_submodules 2 for its task_type; found 1"),
        ({"num_transformer_submodules": 3}, "expected num_transformer_submodules 1 for its task_type; found 3"),
        ({"num_transformer_submodules": "2"}, "expected num_transformer_submodules 1 for its task_type; found '2'"),
        ({"num_layers": "two"}, "expected num_layers, a whole number from 1; found 'two'"),
        ({"revision": 5}, "adapter_config.json: expected revision, a string or null; found 5"),
        ({"base_model_name_or_path": ["a"]}, "expected base_model_name_or_path, a string or null; found ['a']"),
        ({"num_virtual_tokens": 0}, "expected num_virtual_tokens, a whole number from 1; found 0"),
        ({"num_attention_heads": 3}, "expected token_dim to be a multiple of its 3 heads; found 32"),
        ({"num_virtual_tokens": 6}, "expected prompt_embeddings of [6, 128], as adapter_config.json says"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": 9}, "expected num_frozen_tokens of 0 to 5; found 9"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], told: str, imported: Prefix, tmp_path: Path) -> None:
    edit(tmp_path / "made", **changes)
    with pytest.raises(FormatError) as caught:
        import_peft(tmp_path / "made")
    assert told in str(caught.value)


def test_folders_that_are_refused(imported: Prefix, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    weights = folder / "adapter_model.safetensors"
    stored = load_file(weights)
    save_file({**stored, "base_model.score.weight": np.zeros(2, np.float32)}, weights)
    assert "expected only prompt_embeddings; found base_model.score.weight" in refusal(folder)
    save_file({"prompt_embeddings": stored["prompt_embeddings"].astype(np.float64)}, weights)
    assert "found [5, 128] in F64" in refusal(folder)
    weights.write_bytes(b"12345678" + weights.read_bytes())
    assert "expected a header" in refusal(folder)
    weights.rename(folder / "adapter_model.bin")
    assert "found adapter_model.bin, a pickle; load it with PEFT and save it again" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert "expected a safetensors file; found nothing" in refusal(folder)
    (folder / "adapter_config.json").write_text("[1]")
    assert "expected a JSON object; found a list" in refusal(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "expected valid JSON" in refusal(folder)
    shutil.rmtree(folder)
    assert "expected a PEFT folder with adapter_config.json; found no such folder" in refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(FormatError) as caught:
        import_peft(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_numbers_that_no_prefix_has(imported: Prefix, tmp_path: Path) -> None:
    weights = tmp_path / "made" / "adapter_model.safetensors"
    stored = load_file(weights)["prompt_embeddings"].copy()
    stored[0, 0] = np.nan
    save_file({"prompt_embeddings": stored}, weights)
    told = f"{tmp_path / 'made'}: expected finite numbers for decoder.self.layers.0.key; found NaN or Infinity; its"
    assert refusal(tmp_path / "made").startswith(told)


def test_another_backbone_is_refused(backbone_folder: Folder, imported: Prefix, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"backbone's 2 layers .* \(4, 16, 16\); found 2 of \(2, 16, 16\)"):
        import_peft(tmp_path / "made", backbone=backbone_folder("gpt2"))
    with pytest.raises(BackboneError, match="expected a folder"):
        import_peft(tmp_path / "made", backbone=tmp_path / "nothing")


def test_a_window_that_would_swallow_the_prefix_is_told(backbone_folder: Folder, tmp_path: Path) -> None:
    wide = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    get_peft_model(model_in(backbone_folder("mistral_window")), wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(BackboneError, match="window would swallow"):
        import_peft(tmp_path / "wide", backbone=backbone_folder("mistral_window"))


def test_what_peft_cannot_express_is_not_exported(imported: Prefix, tmp_path: Path) -> None:
    (record,) = imported.manifest.injections
    moved = replace(record, positions=Positions(text_start=0, prefix_takes_positions=False))
    slots = replace(record, placement="slots")
    head = replace(record, kind="task_head", stack=None, attention=None, length=None, positions=None, labels=2)
    uneven = {**imported.tensors, "decoder.self.layers.1.key": np.zeros((2, LENGTH, 8), np.float32)}
    mixed = {**imported.tensors, "decoder.self.layers.1.key": np.zeros((2, LENGTH, 16), np.float16)}
    for records, tensors, told in (
        (
            (moved,),
            imported.tensors,
            "position 5, after the prefix; found text that starts at 0, as the prefix takes no",
        ),
        ((slots,), imported.tensors, "found some in slots of the text; see `prefixkit runtimes`"),
        ((record, head), imported.tensors, "own attention; found key_value_prefix.decoder.self, task_head"),
        ((record,), uneven, r"same shape for all keys and values; found \(2, 5, 16\) and \(2, 5, 8\)"),
        ((record,), mixed, "one dtype for all keys and values; found float16 and float32"),
    ):
        prefix = Prefix(replace(imported.manifest, injections=records), tensors)
        with pytest.raises(FormatError, match=rf"^prefix for .*: .*{told}"):
            export_peft(prefix, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_export_replaces_its_own_kind_only(imported: Prefix, tmp_path: Path) -> None:
    export_peft(imported, tmp_path / "out")
    export_peft(imported, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(InputError, match="found other files in it"):
        export_peft(imported, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_folders_that_peft_saved_are_not_replaced(imported: Prefix, backbone_folder: Folder, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    get_peft_model(model_in(backbone_folder("llama")), LoraConfig(target_modules=["q_proj"])).save_pretrained(lora)
    (lora / "checkpoint-500").mkdir()
    (lora / "checkpoint-500" / "optimizer.pt").touch()
    # A prefix that PEFT trained, without the README.md that it writes.
    (tmp_path / "made" / "README.md").unlink()
    export_peft(imported, tmp_path / "ours")
    (tmp_path / "ours" / "notes.txt").touch()
    for folder in (lora, tmp_path / "made", tmp_path / "ours"):
        before = sorted(folder.rglob("*"))
        with pytest.raises(InputError, match="expected an empty folder or a new one; found other files in it"):
            export_peft(imported, folder)
        assert sorted(folder.rglob("*")) == before


def test_commands(backbone_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, prefix, back = made_by_peft(backbone_folder("gpt2"), tmp_path / "peft"), tmp_path / "p", tmp_path / "back"
    bind = ["--backbone", str(backbone_folder("gpt2"))]
    assert run(["import", "--peft", str(folder), *bind, "-o", str(prefix)]) == 0
    assert f"next: prefixkit inspect {prefix}" in capsys.readouterr().out
    assert run(["inspect", str(prefix), *bind]) == 0
    assert run(["export", "--peft", str(prefix), "-o", str(back)]) == 0
    weights = "adapter_model.safetensors"
    assert load_file(back / weights)["prompt_embeddings"].tobytes() == (
        load_file(folder / weights)["prompt_embeddings"].tobytes()
    )
    assert run(["import", "--peft", str(folder), "-o", str(prefix)]) == 0
    assert "unknown: only its configuration will be checked" in capsys.readouterr().out


def test_commands_refuse_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    for arguments, told in (
        (["import", str(tmp_path), "-o", output], "import: expected where the prefix comes from; found none; add"),
        (["import", "--peft", str(tmp_path), "-o", output], "expected a PEFT folder with adapter_config.json"),
        (["export", "--peft", "-o", output], "export --peft: expected a prefix file; found none"),
        (["export", "--peft", "--onnx", "x", "-o", output], "export: expected a form to export to; found two"),
        (["export", "--peft", str(tmp_path / "none"), "-o", output], "expected a safetensors file; found nothing"),
    ):
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
