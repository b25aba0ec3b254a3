"""Prefix-Tuning and Prompt Tuning on encoder-decoders by the whole path: trained, repeated, inspected, scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.data.batches import encode_examples
from prefixkit.data.readers import Example
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefixes, injection
from prefixkit.methods.catalogue import METHODS
from prefixkit.methods.prefix_tuning import PLACES
from prefixkit.prefix import load, save
from prefixkit.task import decode_target, load_task, load_tokenizer
from prefixkit.training import loop
from tests.encoder_decoders import END, folder_of
from tests.training.test_loop import Interrupted, settings

Folder = Callable[[str], Path]
Out = pytest.CaptureFixture[str]
FAMILIES = ["bart_uneven", "t5_uneven"]
PROMPT = {"name": "prompt-tuning", "length": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = folder_of(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_repeats_itself_and_resumes_to_the_byte(
    folder: Folder, records: Path, tmp_path: Path, family: str
) -> None:
    one, two, broken = (settings(folder(family), records, tmp_path / name) for name in ("one", "two", "broken"))
    loop.train(one, listener=(heard := Interrupted()))
    assert heard.validations[-1].loss < heard.validations[0].loss - 0.02
    loop.train(two)
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, listener=Interrupted(5))
    loop.train(broken, resume=True)
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "broken")}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_its_file_holds_three_prefixes_and_scores(
    folder: Folder, records: Path, tmp_path: Path, capfd: Out, family: str
) -> None:
    path, backbone = tmp_path / "p.safetensors", str(folder(family))
    loop.train(settings(folder(family), records, path))
    stored = load(path)
    places = [(record.stack, record.attention, record.length) for record in stored.manifest.injections]
    assert places == [("decoder", "self", 4), ("encoder", "self", 4), ("decoder", "cross", 4)]
    assert {record.positions for record in stored.manifest.injections} == {
        Positions(text_start=0, prefix_takes_positions=False)
    }
    assert run(["inspect", str(path), "--backbone", backbone]) == 0
    told = capfd.readouterr().out
    assert "fits backbone" in told
    assert all(place in told for place in PLACES)
    assert told.count("text starts at 0; the prefix takes no position ids") == 3
    scoring = ["eval", str(path), "--backbone", backbone, "--data", str(records), "--limit", "6", "--json"]
    losses = []
    for more in ([], ["--num-beams", "2"], ["--no-prefix"]):
        assert run([*scoring, "--max-new-tokens", "4", *more]) == 0
        losses.append(json.loads(capfd.readouterr().out)["metrics"]["loss"])
    assert losses[0] == losses[1] < losses[2] - 0.02


def test_a_file_comes_back_bit_for_bit_and_is_a_start(folder: Folder, records: Path, tmp_path: Path) -> None:
    only = {"length": 4, "stacks": "encoder.self,decoder.cross"}
    first = loop.train(settings(folder("t5_uneven"), records, tmp_path / "p", method=only, steps=2))
    assert [record.stack for record in first.manifest.injections] == ["encoder", "decoder"]
    assert len(first.tensors) == 2 * (3 + 2)
    received = injection(load(tmp_path / "p"))
    assert isinstance(received, KeyValuePrefixes)
    again = save(type(first)(first.manifest, received.arrays()), tmp_path / "q")
    assert again.manifest == first.manifest
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    child = {**only, "init": f"prefix:{tmp_path / 'p'}"}
    second = loop.train(settings(folder("t5_uneven"), records, tmp_path / "r", method=child, steps=0))
    assert second.manifest.provenance.parents == (first.manifest.content,)
    assert all((second.tensors[name] == array).all() for name, array in first.tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_learns_repeats_itself_and_resumes_to_the_byte(
    folder: Folder, records: Path, tmp_path: Path, family: str
) -> None:
    rates = {"method": PROMPT, "optimizer": {"lr": 1.0}}
    one, broken = (settings(folder(family), records, tmp_path / name, **rates) for name in ("one", "broken"))
    loop.train(one, listener=(heard := Interrupted()))
    assert heard.validations[-1].loss < heard.validations[0].loss - 0.02
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, listener=Interrupted(5))
    loop.train(broken, resume=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "broken").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_file_says_where_text_starts_comes_back_and_scores(
    folder: Folder, records: Path, tmp_path: Path, capfd: Out, family: str
) -> None:
    path, backbone = tmp_path / "p.safetensors", str(folder(family))
    first = loop.train(settings(folder(family), records, path, method=PROMPT, optimizer={"lr": 1.0}))
    (record,) = first.manifest.injections
    assert (record.kind, record.stack, record.placement, record.length) == ("embedding_prompt", "encoder", "prepend", 4)
    assert record.positions == Positions(text_start=4, prefix_takes_positions=True)
    assert {name: array.shape for name, array in first.tensors.items()} == {"prompt.embeddings": (4, 64)}
    received = injection(load(path))
    again = save(type(first)(first.manifest, received.arrays()), tmp_path / "q")
    assert again.manifest == first.manifest
    assert path.read_bytes() == (tmp_path / "q").read_bytes()
    assert run(["inspect", str(path), "--backbone", backbone]) == 0
    assert "fits backbone" in capfd.readouterr().out
    scoring = ["eval", str(path), "--backbone", backbone, "--data", str(records), "--limit", "6", "--json"]
    losses = []
    for more in ([], ["--num-beams", "2"], ["--no-prefix"]):
        assert run([*scoring, "--max-new-tokens", "4", *more]) == 0
        losses.append(json.loads(capfd.readouterr().out)["metrics"]["loss"])
    assert losses[0] == losses[1] < losses[2] - 0.02


@pytest.mark.parametrize("init", ["text:blue mill", "vocabulary", "uniform", "uniform:code", "prefix"])
def test_a_prompt_starts_where_it_is_asked_to(folder: Folder, records: Path, tmp_path: Path, init: str) -> None:
    run_of = partial(settings, folder("t5_uneven"), records, steps=0)
    parent = loop.train(run_of(tmp_path / "parent", method=PROMPT))
    asked = f"prefix:{tmp_path / 'parent'}" if init == "prefix" else init
    made = loop.train(run_of(tmp_path / "p", method={**PROMPT, "init": asked})).tensors["prompt.embeddings"]
    assert np.array_equal(made, parent.tensors["prompt.embeddings"]) == (init == "prefix")


def test_a_prompt_starts_from_labels_and_chooses_among_them(folder: Folder, tmp_path: Path, capfd: Out) -> None:
    task, data, path = (tmp_path / name for name in ("task.toml", "data.jsonl", "p.safetensors"))
    task.write_text('input_template = "{text}"\n[verbalizer]\n1 = "cheap"\n0 = "blue mill"\n')
    rows = [{"text": text, "label": label} for text, label in (("the pub", 1), ("eagle", 0))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    method = {**PROMPT, "init": "labels"}
    asked = {"method": method, "task": str(task), "batch_size": 2}
    backbone = load_backbone(folder("t5_uneven"))
    words = load_tokenizer(backbone.folder)
    start = loop.train(settings(folder("t5_uneven"), data, path, steps=0, **asked)).tensors["prompt.embeddings"]
    means = [backbone.vocabulary[words.encode_text(word)].mean(dim=0) for word in ("cheap", "blue mill")]
    assert np.abs(start[:2] - torch.stack(means).numpy()).max() <= 1e-6
    loop.train(settings(folder("t5_uneven"), data, path, steps=4, **asked))
    scoring = ["eval", str(path), "--backbone", str(backbone.folder), "--data", str(data), "--json"]
    assert run(scoring) == 0
    assert 0 <= json.loads(capfd.readouterr().out)["metrics"]["accuracy"] <= 100


def test_a_prompt_shortens_what_fits_a_context_with_an_end(folder: Folder, records: Path, tmp_path: Path) -> None:
    prompt = settings(folder("bart_uneven"), records, tmp_path / "p", method=PROMPT)
    assert loop.prepare(prompt).task.max_length == 128 - 4
    assert loop.prepare(settings(folder("bart_uneven"), records, tmp_path / "p")).task.max_length == 128


@pytest.mark.parametrize(("family", "begin"), [("bart_uneven", "<s>"), ("t5_uneven", "")])
def test_source_and_target_are_what_the_model_was_taught(folder: Folder, family: str, begin: str) -> None:
    """BART reads and writes `<s> … </s>` and T5 `… </s>`."""
    tokenizer = load_tokenizer(folder(family))
    task = load_task("text", tokenizer, max_length=99, kind="encoder-decoder")
    (example,) = encode_examples(task, tokenizer, [Example({"input": "blue"}, "a pub", "d.jsonl:1")])
    assert tokenizer.decode(example.prompt) == f"{begin}blue<|im_end|>"
    assert tokenizer.decode(example.target) == f"{begin}a pub<|im_end|>"
    assert decode_target(task, tokenizer, example.target) == "a pub"


def test_the_loss_is_the_models_own(folder: Folder, records: Path, tmp_path: Path) -> None:
    for family in FAMILIES:
        prepared = loop.prepare(settings(folder(family), records, tmp_path / "p"))
        batch, model = prepared.batches.batch(0), load_backbone(folder(family)).model
        first = prepared.batches.examples[prepared.batches.indices(0)[0]]
        assert batch.input_ids[0, : len(first.prompt)].tolist() == list(first.prompt)
        assert (first.prompt[-1], first.target[-1]) == (END, END)
        assert batch.labels[0, : len(first.target)].tolist() == list(first.target)
        lengths = [len(prepared.batches.examples[index].prompt) for index in prepared.batches.indices(0)]
        assert batch.attention_mask.sum(1).tolist() == lengths
        with torch.no_grad():
            own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            found = prepared.objective(prepared.backbone, batch, None) / batch.target_tokens
        assert found.item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["p-tuning", "autoprompt", "p-tuning-v2"])
def test_other_methods_are_refused(folder: Folder, records: Path, tmp_path: Path, capfd: Out, method: str) -> None:
    asked = ["train", "--backbone", str(folder("bart_uneven")), "--data", str(records), "-o", str(tmp_path / "p")]
    assert run([*asked, "--method", method]) == 2
    told = capfd.readouterr().err.strip()
    kinds = " or ".join(METHODS[method].backbones)
    expected = (
        f"expected a backbone of the kind {kinds}; found bart, of the kind encoder-decoder; use --method prefix-tuning"
    )
    assert expected in told
    assert "\n" not in told
    assert list(tmp_path.iterdir()) == []


def test_exports_that_cannot_be_are_refused_before_any_work(
    folder: Folder, records: Path, tmp_path: Path, capfd: Out
) -> None:
    loop.train(settings(folder("bart_uneven"), records, tmp_path / "p", steps=0))
    capfd.readouterr()
    out, backbone = ["-o", str(tmp_path / "out")], ["--backbone", str(folder("bart_uneven"))]
    for asked, told in (
        (
            ["--onnx", str(tmp_path / "p"), *backbone, "--baked"],
            "--baked: expected a decoder; found an encoder-decoder",
        ),
        (["--onnx", *backbone, "--dtype", "float16"], "--dtype: expected float32 for an encoder-decoder"),
        (
            ["--peft", str(tmp_path / "p")],
            "keys and values in a decoder's own attention; found key_value_prefix.decoder",
        ),
    ):
        assert run(["export", *asked, *out]) == 2
        line = capfd.readouterr().err.strip()
        assert told in line
        assert "\n" not in line
        assert not (tmp_path / "out").exists()


def test_a_prefix_that_holds_the_bos_is_refused(folder: Folder, records: Path, tmp_path: Path) -> None:
    task = tmp_path / "t.toml"
    task.write_text('bos = "before"')
    with pytest.raises(ConfigError, match='task: expected bos = "after" or "none" for an encoder-decoder'):
        loop.train(settings(folder("bart_uneven"), records, tmp_path / "p", task=str(task)))
