"""PEFT's prefixes of encoder-decoders there and back, with PEFT itself as the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.peft import export_peft, import_peft
from prefixkit.bridges.transformers_cache import dynamic_cache, static_cache, text_behind
from prefixkit.errors import BackboneError, FormatError, MismatchError
from prefixkit.injections import records_of
from prefixkit.prefix import Prefix, load, save
from tests.encoder_decoders import folder_of, random_prefixes, tiny, wrap
from tests.ragged import padded, prompts
from tests.small_tokenizer import write_folder

# PEFT 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH = 5
TOLERANCE = 1e-5
EFFECT = 1.0
WEIGHTS = "adapter_model.safetensors"
_NEVER = "PEFT stores keys and values for {} layers and never reads layer 1: left behind"
_TWICE = "; it gives each of the others to two layers of the decoder"
LOST = {
    "bart": _NEVER.format(2) + _TWICE,
    "t5": _NEVER.format(2) + _TWICE,
    "bart_uneven": _NEVER.format(3),
    "t5_uneven": _NEVER.format(3),
}


def model_in(folder: Path) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def made_by_peft(backbone: Path, folder: Path, config: Any = PrefixTuningConfig, **options: Any) -> Path:
    """What PEFT saves of a prefix, its numbers then scaled to matter."""
    torch.manual_seed(7)
    asked = config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, **options)
    get_peft_model(model_in(backbone), asked).save_pretrained(folder)
    stored = load_file(folder / WEIGHTS)["prompt_embeddings"]
    save_file({"prompt_embeddings": stored * np.float32(2)}, folder / WEIGHTS, {"format": "pt"})
    return folder


def batch() -> dict[str, Tensor]:
    return {**padded(prompts(), "right"), "decoder_input_ids": torch.stack([row[:5] for row in prompts()])}


@torch.no_grad()
def logits(model: Any, **more: Any) -> Tensor:
    found: Tensor = model(**batch(), **more).logits
    return found


def assert_peft_computes_it(backbone: Path, folder: Path, prefix: Prefix) -> None:
    """Logits and greedy tokens, in PEFT and with the prefix in the cache of the decoder."""
    theirs, ours = PeftModel.from_pretrained(model_in(backbone), folder).eval(), model_in(backbone)
    expected = logits(theirs)
    assert (logits(ours, past_key_values=dynamic_cache(prefix, ours, batch=3)) - expected).abs().max() <= TOLERANCE
    assert (expected - logits(ours)).abs().max() > EFFECT
    text, options = padded(prompts(), "right"), {"max_new_tokens": 6, "do_sample": False}
    cache = dynamic_cache(prefix, ours, batch=3)
    written = ours.generate(**text_behind(prefix, ours, **text), past_key_values=cache, **options)
    assert torch.equal(written, theirs.generate(**text, **options))
    assert not torch.equal(written, ours.generate(**text, **options))


@pytest.mark.parametrize("family", LOST)
def test_import_computes_what_peft_computes_and_so_does_the_way_back(family: str, tmp_path: Path) -> None:
    backbone = folder_of(family, tmp_path / "model")
    folder = made_by_peft(backbone, tmp_path / "peft")
    prefix = save(import_peft(folder, backbone=backbone), tmp_path / "p")
    assert prefix.manifest.provenance.config["lost"] == [LOST[family]]
    assert prefix.manifest.backbone == load_backbone(backbone).identity
    assert_peft_computes_it(backbone, folder, load(tmp_path / "p"))
    export_peft(prefix, tmp_path / "back")
    assert_peft_computes_it(backbone, tmp_path / "back", prefix)
    back = import_peft(tmp_path / "back", backbone=backbone)
    assert all(back.tensors[name].tobytes() == array.tobytes() for name, array in prefix.tensors.items())


def test_what_peft_reads_of_an_odd_number_of_layers_is_all_that_it_stores(tmp_path: Path) -> None:
    backbone = tmp_path / "model"
    config = tiny("t5_uneven").config
    config.num_decoder_layers = 3
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(backbone)
    write_folder(backbone)
    folder = made_by_peft(backbone, tmp_path / "peft")
    prefix = import_peft(folder, backbone=backbone)
    assert "lost" not in prefix.manifest.provenance.config
    export_peft(prefix, tmp_path / "back")
    before, after = (load_file(place / WEIGHTS)["prompt_embeddings"] for place in (folder, tmp_path / "back"))
    assert before.tobytes() == after.tobytes()
    assert import_peft(tmp_path / "back", backbone=backbone).manifest == prefix.manifest


@pytest.mark.parametrize("family", ["bart", "flan"])
def test_every_layer_of_an_even_number_gets_its_own(family: str, tmp_path: Path) -> None:
    backbone = folder_of(family, tmp_path / "model")
    (part,) = random_prefixes(wrap(model_in(backbone)), LENGTH, (("decoder", "self"),)).parts
    template = import_peft(made_by_peft(backbone, tmp_path / "peft", token_dim=64), backbone=backbone)
    prefix = Prefix(template.manifest, {name: array * 2 for name, array in part.arrays().items()})
    export_peft(prefix, tmp_path / "out")
    assert_peft_computes_it(backbone, tmp_path / "out", prefix)
    back = import_peft(tmp_path / "out", backbone=backbone)
    assert all(back.tensors[name].tobytes() == array.tobytes() for name, array in prefix.tensors.items())
    assert back.manifest.provenance.config["lost"] == [_NEVER.format(3)]


def test_a_cartridge_keeps_its_frozen_slots(tmp_path: Path) -> None:
    backbone = folder_of("t5", tmp_path / "model")
    folder = made_by_peft(backbone, tmp_path / "peft", CartridgeConfig, num_frozen_tokens=2)
    prefix = import_peft(folder, backbone=backbone)
    assert prefix.manifest.injections[0].frozen_slots == 2
    export_peft(prefix, tmp_path / "back")
    assert_peft_computes_it(backbone, tmp_path / "back", prefix)


def test_beam_search_in_a_cache(tmp_path: Path) -> None:
    backbone = folder_of("bart", tmp_path / "model")
    folder = made_by_peft(backbone, tmp_path / "peft")
    prefix, model = import_peft(folder, backbone=backbone), model_in(backbone)
    text, options = padded(prompts(), "right"), {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    cache = dynamic_cache(prefix, model, batch=3, beams=3)
    written = model.generate(**text, past_key_values=cache, **options)
    theirs = PeftModel.from_pretrained(model_in(backbone), folder).eval()
    assert torch.equal(written, theirs.generate(**text, **options))
    assert not torch.equal(written, model.generate(**text, **options))


def test_what_peft_cannot_express_is_not_exported(tmp_path: Path) -> None:
    backbone = folder_of("bart", tmp_path / "model")
    manifest = import_peft(made_by_peft(backbone, tmp_path / "peft"), backbone=backbone).manifest
    everywhere = random_prefixes(wrap(model_in(backbone)), LENGTH)
    for parts, told in (
        (everywhere.parts, "own attention; found key_value_prefix.decoder.self, key_value_prefix.encoder.self, key_v"),
        (everywhere.parts[1:2], "own attention; found key_value_prefix.encoder.self"),
        (
            everywhere.parts[:1],
            "position 5, after the prefix; found text that starts at 0, as the prefix takes no",
        ),
    ):
        records = tuple(record for part in parts for record in records_of(part))
        tensors = {name: array for part in parts for name, array in part.arrays().items()}
        with pytest.raises(FormatError, match=told):
            export_peft(Prefix(replace(manifest, injections=records), tensors), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    bart = folder_of("bart", tmp_path / "bart")
    folder = made_by_peft(bart, tmp_path / "peft")
    prefix = import_peft(folder, backbone=bart)
    with pytest.raises(MismatchError, match="layers of"):
        import_peft(made_by_peft(bart, tmp_path / "narrow", token_dim=32), backbone=bart)
    with pytest.raises(MismatchError, match="layers of"):
        import_peft(made_by_peft(bart, tmp_path / "shallow", num_layers=1), backbone=bart)
    with pytest.raises(BackboneError, match=r"take no positions; found decoder\.self with text that starts at 5; run"):
        attach(model_in(bart), prefix)
    with pytest.raises(BackboneError, match="reads a static cache; found an encoder-decoder; use dynamic_cache"):
        static_cache(prefix, model_in(bart), 32)
    with pytest.raises(MismatchError):
        dynamic_cache(prefix, model_in(folder_of("flan", tmp_path / "flan")))
