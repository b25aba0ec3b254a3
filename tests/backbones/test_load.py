"""`load_backbone`: what a good folder gives, and one line for each bad one before its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPConfig,
    DeepseekV3Config,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
    ViTConfig,
)

from prefixkit.backbones.load import load_backbone, load_decoder, sketch
from prefixkit.errors import BackboneError, ConfigError
from prefixkit.format.digest import backbone_digest
from prefixkit.format.manifest import LayerGeometry
from tests.architectures import CONFIGS, WINDOW, tiny
from tests.ragged import prompts

Folder = Callable[..., Path]


@pytest.fixture
def copied(backbone_folder: Folder, tmp_path: Path) -> Path:
    """A folder with a tiny Llama, to be broken."""
    return shutil.copytree(backbone_folder("llama"), tmp_path / "llama")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(source: Path | str) -> str:
    with pytest.raises(BackboneError) as caught:
        load_backbone(source)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_model_comes_back_frozen(family: str, backbone_folder: Folder) -> None:
    backbone = load_backbone(backbone_folder(family))
    row = prompts()[1][None]
    with torch.no_grad():
        assert torch.equal(backbone.logits(row), tiny(family)(input_ids=row).logits)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.identity.family == tiny(family).config.model_type
    assert backbone.identity.weights_hash == backbone_digest(backbone_folder(family))
    assert backbone.identity.dtype == "float32"
    assert backbone.identity.stacks["decoder"] == backbone.geometry
    config, geometry = sketch(backbone_folder(family))
    assert geometry == backbone.geometry
    assert config.dtype == torch.float32


def test_geometry_is_measured_for_each_layer(backbone_folder: Folder) -> None:
    full = LayerGeometry(kv_heads=2, key_dim=16, value_dim=16)
    assert load_backbone(backbone_folder("llama")).geometry == (full, full)
    sliding = LayerGeometry(kv_heads=2, key_dim=16, value_dim=16, window=WINDOW)
    assert load_backbone(backbone_folder("gemma3")).geometry == (sliding, full)
    assert load_backbone(backbone_folder("mistral_window")).geometry == (sliding, sliding)
    one = LayerGeometry(kv_heads=1, key_dim=16, value_dim=16)
    assert load_backbone(backbone_folder("falcon")).geometry == (one, one)


def test_positions_end_where_the_model_was_built_to(backbone_folder: Folder) -> None:
    assert load_backbone(backbone_folder("gpt2")).context_length == 128
    assert load_backbone(backbone_folder("bloom")).context_length is None


def test_shards_are_the_same_backbone(backbone_folder: Folder, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded, whole = load_backbone(tmp_path / "sharded"), load_backbone(backbone_folder("llama"))
    assert sharded.identity.weights_hash == whole.identity.weights_hash
    with torch.no_grad():
        assert torch.equal(sharded.logits(prompts()[0][None]), whole.logits(prompts()[0][None]))


@pytest.mark.parametrize(("stored", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_weights_are_computed_as_asked_and_remembered_as_stored(
    stored: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny("llama").to(dtype)
    model.save_pretrained(tmp_path / "half")
    backbone = load_backbone(tmp_path / "half")
    assert backbone.model.dtype == torch.float32
    assert backbone.identity.dtype == stored
    assert torch.equal(backbone.model.model.norm.weight, model.model.norm.weight.float())
    assert load_backbone(tmp_path / "half", dtype=stored).model.dtype == dtype
    edit(tmp_path / "half", dtype=None)
    assert load_backbone(tmp_path / "half").identity.dtype == stored


_SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("config", "reason", "step"),
    [
        (lambda: DeepseekV3Config(**_SMALL), "deepseek_v3: multi-head latent attention", "a soft prompt"),
        (lambda: Qwen3NextConfig(num_hidden_layers=4), "qwen3_next: linear_attention layers", "a soft prompt"),
        (lambda: Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"]), "lfm2: conv layers", "a soft prompt"),
        (JambaConfig, "jamba: linear_attention layers", "a soft prompt"),
        (MambaConfig, "mamba: linear_attention layers", "a soft prompt"),
        (RwkvConfig, "rwkv: no attention heads", "a soft prompt"),
        (CLIPConfig, "clip: a multimodal model", "its language model alone"),
    ],
)
def test_what_cannot_take_a_prefix_is_refused_without_reading_weights(
    config: Callable[[], PreTrainedConfig], reason: str, step: str, tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path)
    line = refusal(tmp_path)
    assert "expected a decoder in which every layer keeps keys and values" in line
    assert f"found {reason}" in line
    assert step in line


@pytest.mark.parametrize("config", [BertConfig, ModernBertConfig, ViTConfig])
def test_encoders_are_refused_where_only_a_decoder_will_do(
    config: Callable[[], PreTrainedConfig], tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="no causal language model; use a decoder such as Llama"):
        load_decoder(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "found nothing; check the path" in refusal(tmp_path / "nothing")
    assert "found nothing" in refusal("./nothing")
    assert "found nothing" in refusal("")
    (tmp_path / "file").touch()
    assert "found a file" in refusal(tmp_path / "file")


def test_hub_ids_without_a_network() -> None:
    line = refusal("prefixkit-tests/no-such-model")
    assert line.startswith("prefixkit-tests/no-such-model: expected a folder or a hub id that can be reached")
    assert "no copy in the cache and no connection" in line
    assert "found no valid id" in refusal("not an id!")


def test_empty_folder(tmp_path: Path) -> None:
    assert "config.json: expected config.json of a transformers model; found none" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "line 1 column 2"),
        ("[]", "a JSON list"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "of-tomorrow"}', "model type `of-tomorrow`"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Field 'hidden_size' expected int, got str"),
        ('{"model_type": "llama", "hidden_size": 63}', "not a multiple of the number of attention heads"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}', "custom code"),
    ],
)
def test_broken_configuration(text: str, found: str, copied: Path) -> None:
    (copied / "config.json").write_text(text)
    line = refusal(copied)
    assert line.startswith(f"{copied / 'config.json'}: expected ")
    assert found in line


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json; found no weights" in refusal(copied)
    (copied / "pytorch_model.bin").touch()
    assert "found pytorch_model.bin; convert it" in refusal(copied)


def test_damaged_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    for part in (b"", whole[:7], whole[:100], whole[: len(whole) // 2], b"not safetensors at all"):
        weights.write_bytes(part)
        line = refusal(copied)
        assert line.startswith(f"{weights}: expected ")
        assert line.endswith("download the model again")


def test_a_missing_shard(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"expected the shard {shard.name}; found no such file" in refusal(tmp_path)


def test_weights_of_another_shape(copied: Path) -> None:
    edit(copied, vocab_size=400)
    assert "expected weights that fit config.json, such as lm_head.weight [400, 64]; found [320, 64]" in refusal(copied)


def test_missing_weights(copied: Path) -> None:
    edit(copied, num_hidden_layers=3)
    assert "expected every weight of the model; found none for model.layers.2.input_layernorm" in refusal(copied)
    edit(copied, num_hidden_layers=2, model_type="qwen2", layer_types=None)
    assert "found none for model.layers.0.self_attn.k_proj.bias" in refusal(copied)


def test_unknown_dtype(copied: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: expected float32, bfloat16, float16; found 'int8'"):
        load_backbone(copied, dtype="int8")
