"""Prompts of google-research/prompt-tuning: one array in a NumPy file, there and back."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.google_prompt import export_google_prompt, import_google_prompt
from prefixkit.cli import run
from prefixkit.errors import BackboneError, FormatError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.prefix import Prefix, load, save
from tests.encoder_decoders import folder_of
from tests.prefixes import small_prefix

Folder = Callable[..., Path]
LENGTH, WIDTH = 5, 64
TEXT = torch.arange(40, 52)[None]


def stored(path: Path, dtype: Any = np.float32, order: str = "C") -> Path:
    vectors = np.random.default_rng(3).normal(size=(LENGTH, WIDTH))
    np.save(path, np.array(vectors, dtype=dtype, order=order))  # type: ignore[call-overload]
    return path


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def test_a_prompt_is_what_stands_before_the_text(backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder("llama")
    prefix = import_google_prompt(stored(tmp_path / "p.npy"), backbone=str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = torch.from_numpy(np.load(tmp_path / "p.npy"))
    together = torch.cat([vectors, model.get_input_embeddings()(TEXT)[0].detach()])[None]
    expected, bare = logits(model, inputs_embeds=together)[:, LENGTH:], logits(model, input_ids=TEXT)
    found = logits(attach(model, prefix), input_ids=TEXT)
    assert (found - expected).abs().max() <= 1e-4
    assert (found - bare).abs().max() > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_there_and_back(dtype: Any, backbone_folder: Folder, tmp_path: Path) -> None:
    source, back = stored(tmp_path / "p.npy", dtype), tmp_path / "back.npy"
    prefix = save(import_google_prompt(source, backbone=str(backbone_folder("gpt2"))), tmp_path / "prefix")
    carried = export_google_prompt(load(tmp_path / "prefix"), back)
    assert back.read_bytes() == source.read_bytes()
    assert carried.lost == ()
    assert str(back) in carried.next
    again = save(import_google_prompt(back, backbone=str(backbone_folder("gpt2"))), tmp_path / "again")
    assert again.manifest.content == prefix.manifest.content
    assert prefix.manifest.backbone == load_backbone(backbone_folder("gpt2")).identity


def test_bfloat16_comes_in_as_jax_saves_it_and_goes_out_wider(backbone_folder: Folder, tmp_path: Path) -> None:
    source, back = stored(tmp_path / "p.npy", ml_dtypes.bfloat16), tmp_path / "back.npy"
    prefix = import_google_prompt(source, backbone=str(backbone_folder("gpt2")))
    assert prefix.tensors["prompt.embeddings"].dtype == ml_dtypes.bfloat16
    carried = export_google_prompt(prefix, back)
    assert np.load(back).dtype == np.float32
    assert (np.load(back) == prefix.tensors["prompt.embeddings"].astype(np.float32)).all()
    assert carried.lost == ("NumPy files have no bfloat16: it is float32 there, no number changed",)


@pytest.mark.parametrize(("dtype", "order"), [(">f4", "C"), ("<f4", "F")])
def test_other_ways_to_store_the_same(dtype: str, order: str, backbone_folder: Folder, tmp_path: Path) -> None:
    prefix = import_google_prompt(stored(tmp_path / "p.npy", dtype, order), backbone=str(backbone_folder("gpt2")))
    (vectors,) = prefix.tensors.values()
    assert vectors.dtype == np.float32
    assert (vectors == np.load(tmp_path / "p.npy")).all()
    save(prefix, tmp_path / "prefix")


def test_on_an_encoder_decoder_it_stands_before_the_encoder(tmp_path: Path) -> None:
    folder = folder_of("t5", tmp_path / "t5")
    prefix = import_google_prompt(stored(tmp_path / "p.npy"), backbone=str(folder))
    assert prefix.manifest.injections[0].stack == "encoder"
    save(prefix, tmp_path / "prefix")
    export_google_prompt(prefix, tmp_path / "back.npy")
    assert (tmp_path / "back.npy").read_bytes() == (tmp_path / "p.npy").read_bytes()


class Harm:
    """What would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path, harm = tmp_path / "p.npy", tmp_path / "harm"

    def refusal() -> str:
        with pytest.raises(FormatError) as caught:
            import_google_prompt(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "found nothing; check the path" in refusal()
    np.save(path, np.array([Harm(harm)], dtype=object), allow_pickle=True)
    assert "found Python objects, which are not read" in refusal()
    path.write_bytes(pickle.dumps(Harm(harm)))
    assert "found a file that is none" in refusal()
    assert not harm.exists()
    whole = stored(path).read_bytes()
    path.write_bytes(whole[:-4])
    assert "found a file that is none" in refusal()
    for shape in (b"(99,64), }", b"(5, 1<<9)}"):
        path.write_bytes(whole.replace(b"(5, 64), }", shape))
        assert "found a file that is none" in refusal()
    path.write_bytes(b"")
    assert "found a file that is none" in refusal()
    np.save(path, np.zeros((LENGTH, WIDTH)))
    assert "found [5, 64] of float64" in refusal()
    np.save(path, np.zeros((1, LENGTH, WIDTH), np.float32))
    assert "found [1, 5, 64] of float32" in refusal()
    np.save(path, np.zeros((0, WIDTH), np.float32))
    assert "found [0, 64] of float32" in refusal()


def test_a_backbone_is_needed_and_must_fit(backbone_folder: Folder, tmp_path: Path) -> None:
    path = stored(tmp_path / "p.npy")
    with pytest.raises(BackboneError, match="found a file that names none; give it with --backbone"):
        import_google_prompt(path)
    np.save(path, np.zeros((2, 32), np.float32))
    with pytest.raises(MismatchError, match="vectors of the backbone's width 64; found 32"):
        import_google_prompt(path, backbone=str(backbone_folder("gpt2")))


def test_numbers_and_lengths_that_no_prefix_has(backbone_folder: Folder, tmp_path: Path) -> None:
    path, gpt2 = tmp_path / "p.npy", backbone_folder("gpt2")
    np.save(path, np.full((LENGTH, WIDTH), np.nan, np.float32))
    with pytest.raises(FormatError, match=rf"^{path}: expected finite numbers for prompt.embeddings; found NaN"):
        import_google_prompt(path, backbone=gpt2)
    np.save(path, np.zeros((128, WIDTH), np.float32))
    with pytest.raises(MismatchError, match=rf"^{path}: expected fewer than the 128 positions of .*; found 128; give"):
        import_google_prompt(path, backbone=gpt2)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_no_model_is_loaded(
    family: str, backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    folder = backbone_folder(family) if family == "gpt2" else folder_of(family, tmp_path / family)
    expected = load_backbone(folder).identity
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    found = import_google_prompt(str(stored(tmp_path / "p.npy")), backbone=folder)
    assert found.manifest.backbone == expected
    assert export_google_prompt(found, str(tmp_path / "back.npy")).output == tmp_path / "back.npy"


def test_what_it_cannot_hold_is_refused(backbone_folder: Folder, tmp_path: Path) -> None:
    prompt = import_google_prompt(stored(tmp_path / "p.npy"), backbone=str(backbone_folder("gpt2")))
    (record,) = prompt.manifest.injections

    def changed(**changes: Any) -> Prefix:
        return Prefix(replace(prompt.manifest, injections=(replace(record, **changes),)), prompt.tensors)

    for prefix, told in (
        (small_prefix(), "found key_value_prefix"),
        (changed(placement="slots"), "found one in slots of the text"),
        (changed(placement="after_first"), "found one behind the first token of the text; see `prefixkit runtimes`"),
        (changed(positions=Positions(text_start=0)), "found text that starts at 0"),
    ):
        with pytest.raises(
            FormatError, match="expected a soft prompt before the text of a decoder or an enc"
        ) as caught:
            export_google_prompt(prefix, tmp_path / "out.npy")
        assert told in str(caught.value)
        assert not (tmp_path / "out.npy").exists()


def test_commands(backbone_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, prefix, back = stored(tmp_path / "p.npy"), str(tmp_path / "prefix"), tmp_path / "back.npy"
    assert run(["import", "--google-prompt", str(source), "-o", prefix]) == 2
    assert "give it with --backbone" in capfd.readouterr().err
    assert (
        run(["import", "--google-prompt", str(source), "-o", prefix, "--backbone", str(backbone_folder("gpt2"))]) == 0
    )
    assert run(["export", "--google-prompt", prefix, "-o", str(back)]) == 0
    assert f"wrote {back}" in capfd.readouterr().out
    assert back.read_bytes() == source.read_bytes()
