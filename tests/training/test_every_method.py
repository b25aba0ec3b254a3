"""Every method by the same path: trained, saved, repeated, resumed, inspected, evaluated, exported, served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.snapshot import snapshot
from prefixkit.cli import run
from prefixkit.errors import ConfigError
from prefixkit.export.onnx import export_onnx
from prefixkit.injections import EmbeddingPrompt, injection
from prefixkit.methods.catalogue import METHODS, TRAINED
from prefixkit.prefix import load, save
from prefixkit.serving.session import Session
from prefixkit.task import encode_prompt, load_tokenizer, stop_ids
from prefixkit.training import loop
from tests.training.test_loop import Interrupted, settings

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]


ON_DECODERS = [
    name
    for name in TRAINED
    if "decoder" in METHODS[name].backbones and name != "linear-probe" and METHODS[name].slots != "needed"
]
"""A probe alone changes no word that a decoder writes; what needs slots is in test_slots.py."""
LR = {"prompt-tuning": 1.0, "p-tuning": 0.01, "bitfit": 0.02}
"""What moves a tiny random model within a few steps."""
SEED = {"autoprompt": 2}
"""A search finds little in so few steps, with some seeds nothing."""


def chosen(method: str, folder: Path) -> dict[str, Any]:
    """Four slots of a method that has some, and a document where it wants one."""
    if method == "bitfit":
        return {"name": method}
    if method != "cartridge":
        return {"name": method, "length": 4}
    (folder / "document.txt").write_text("blue spice is near river .\nmill is near city .\n")
    return {"name": method, "length": 4, "document": str(folder / "document.txt")}


@pytest.fixture
def trained(backbone_folder: Folder, records: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`trained("p-tuning")`: a file of that method, after twelve steps on a tiny GPT-2."""

    def make(method: str) -> Path:
        output = tmp_path / f"{method}.safetensors"
        given = chosen(method, tmp_path)
        loop.train(
            settings(backbone_folder("gpt2"), records, output, method=given, optimizer={"lr": LR.get(method, 0.05)})
        )
        return output

    return make


@pytest.mark.parametrize("method", ON_DECODERS)
def test_the_same_seed_and_a_resumed_run_give_the_same_bytes(
    backbone_folder: Folder, records: Path, tmp_path: Path, method: str
) -> None:
    names = ("one", "two", "broken")
    given = chosen(method, tmp_path)
    one, two, broken = (settings(backbone_folder("gpt2"), records, tmp_path / name, method=given) for name in names)
    loop.train(one)
    loop.train(two)
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, listener=Interrupted(5))
    loop.train(broken, resume=True)
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


@pytest.mark.parametrize("method", ON_DECODERS)
def test_it_learns(backbone_folder: Folder, records: Path, tmp_path: Path, method: str) -> None:
    heard, given = Interrupted(), chosen(method, tmp_path)
    how = {"optimizer": {"lr": LR.get(method, 0.1)}, "seed": SEED.get(method, 0), "steps": 60}
    loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", method=given, **how), listener=heard)
    # The backbone is random: what it receives can make words likelier, not right.
    assert heard.validations[-1].loss < heard.validations[0].loss - 0.02


@pytest.mark.parametrize("method", ON_DECODERS)
def test_its_file_says_what_it_is_and_scores(
    trained: Callable[[str], Path], backbone_folder: Folder, records: Path, capfd: Out, method: str
) -> None:
    path = trained(method)
    (record,) = load(path).manifest.injections
    assert record.kind == METHODS[method].injection
    folder = str(backbone_folder("gpt2"))
    assert run(["inspect", str(path), "--backbone", folder]) == 0
    assert "fits backbone    yes" in capfd.readouterr().out
    scoring = ["eval", str(path), "--backbone", folder, "--data", str(records), "--limit", "6"]
    assert run([*scoring, "--max-new-tokens", "4", "--json"]) == 0
    scored = json.loads(capfd.readouterr().out)["metrics"]["loss"]
    assert run([*scoring, "--max-new-tokens", "4", "--json", "--no-prefix"]) == 0
    assert scored < json.loads(capfd.readouterr().out)["metrics"]["loss"] - 0.01


def test_autoprompt_says_its_tokens_and_their_vectors(
    trained: Callable[[str], Path], backbone_folder: Folder, capfd: Out
) -> None:
    path = trained("autoprompt")
    found = injection(load(path))
    assert isinstance(found, EmbeddingPrompt)
    assert found.token_ids is not None
    vocabulary = load_backbone(backbone_folder("gpt2")).vocabulary
    assert torch.equal(found.embeddings, vocabulary[list(found.token_ids)])
    assert run(["inspect", str(path)]) == 0
    assert f"[{', '.join(map(str, found.token_ids))}]" in capfd.readouterr().out


@pytest.mark.parametrize("method", ["prompt-tuning"])
def test_a_prompt_is_folded_on_export_and_serves(
    trained: Callable[[str], Path], backbone_folder: Folder, tmp_path: Path, method: str
) -> None:
    """Once for the kind of injection: what a method emits is all that an export sees."""
    path = trained(method)
    exported = export_onnx(path, backbone_folder("gpt2"), tmp_path / "served")
    assert exported.max_abs_difference <= 1e-4
    effects = [case.effect for case in exported.cases if case.effect is not None]
    assert min(effects) > 0.1
    folded, original = load(tmp_path / "served" / "prefix.safetensors"), load(path)
    assert [record.kind for record in folded.manifest.injections] == ["key_value_prefix"]
    assert folded.manifest.provenance.parents == (original.manifest.content,)
    assert folded.manifest.provenance.method == method
    decoder = load_backbone(backbone_folder("gpt2"))
    prompt = "name : blue | area : mill"
    served = Session(tmp_path / "served").generate([prompt], max_new_tokens=5)[0]
    bare = Session(tmp_path / "served").generate([prompt], None, max_new_tokens=5)[0]
    assert served.token_ids != bare.token_ids
    task, tokenizer = original.manifest.task, load_tokenizer(decoder.folder)
    assert task is not None
    ids, stop = encode_prompt(task, tokenizer, {"input": prompt}, where="test"), stop_ids(task, tokenizer)
    assert list(served.token_ids) == decoder.generate([ids], injection(original), stop=stop, max_new_tokens=5)[0]


def test_a_trained_prompt_is_a_start_and_a_parent(
    trained: Callable[[str], Path], backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    path = trained("prompt-tuning")
    given = {"name": "prompt-tuning", "length": 4, "init": f"prefix:{path}"}
    child = loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "child", method=given, steps=0))
    assert child.manifest.provenance.parents == (load(path).manifest.content,)
    found, start = injection(child), injection(load(path))
    assert isinstance(found, EmbeddingPrompt)
    assert isinstance(start, EmbeddingPrompt)
    assert torch.equal(found.embeddings, start.embeddings)
    other = settings(backbone_folder("gpt2"), records, tmp_path / "p", method={"length": 4, "init": f"prefix:{path}"})
    with pytest.raises(ConfigError, match="a file that holds a KeyValuePrefix; found a EmbeddingPrompt"):
        loop.train(other)


def test_a_snapshot_of_an_attached_prompt_is_the_same_prompt(
    trained: Callable[[str], Path], backbone_folder: Folder, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from prefixkit.methods.prompt_tuning import PromptTuning

    stored = injection(load(trained("prompt-tuning")))
    assert isinstance(stored, EmbeddingPrompt)
    model = attach(AutoModelForCausalLM.from_pretrained(backbone_folder("gpt2")), PromptTuning(stored.embeddings))
    save(snapshot(model, method="prompt-tuning"), tmp_path / "again")
    again = injection(load(tmp_path / "again"))
    assert isinstance(again, EmbeddingPrompt)
    assert torch.equal(again.embeddings, stored.embeddings)


def test_serving_an_unfolded_prompt_says_what_to_do(
    trained: Callable[[str], Path], backbone_folder: Folder, tmp_path: Path, capfd: Out
) -> None:
    path = trained("prompt-tuning")
    export_onnx(None, backbone_folder("gpt2"), tmp_path / "bare")
    asked = ["generate", str(tmp_path / "bare"), "--prompt", "name : blue", "--prefix", str(path)]
    assert run(asked) == 2
    told = capfd.readouterr().err
    assert "found embedding_prompt" in told
    assert "`prefixkit export --onnx` folds a prompt" in told
