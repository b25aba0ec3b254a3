"""Prefix-Tuning in slots of the text by the whole path: trained, repeated, resumed, inspected, scored, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prefixkit.backbones.load import load_decoder
from prefixkit.cli import run
from prefixkit.errors import ConfigError, InputError
from prefixkit.format.manifest import Positions
from prefixkit.injections import Combined, KeyValuePrefix, TaskHead, injection, part_of
from prefixkit.prefix import compare, load, save
from prefixkit.serving.prefix_table import served
from prefixkit.training import loop
from prefixkit.training.preparation import prepare
from tests.encoder_decoders import folder_of
from tests.training.test_loop import Interrupted, settings

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
TASK = 'input_template = "{slot}{input}"\nseparator = "{slot} so{slot}{eos}"\n'
RUNS = [
    ("none", "text"),
    ("none", "text: blue spice"),
    ("none", "random"),
    ("none", "zeros"),
    ("mlp", "text"),
    ("mlp", "random"),
]


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "infix.toml").write_text(TASK)
    return str(tmp_path / "infix.toml")


@pytest.fixture
def made(backbone_folder: Folder, records: Path, task: str, tmp_path: Path) -> Path:
    loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "made", task=task, method={}, steps=3))
    return tmp_path / "made"


@pytest.mark.parametrize(("reparameterization", "init"), RUNS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_learns(
    backbone_folder: Folder, records: Path, task: str, tmp_path: Path, family: str, reparameterization: str, init: str
) -> None:
    method = {"reparameterization": reparameterization, "init": init}
    lr = {"lr": 0.1 if reparameterization == "none" else 0.01}
    heard, folder = Interrupted(), backbone_folder(family)
    loop.train(
        settings(folder, records, tmp_path / "p", task=task, method=method, optimizer=lr, steps=60), listener=heard
    )
    assert heard.validations[-1].loss < heard.validations[0].loss - 0.02
    given = injection(load(tmp_path / "p"))
    assert isinstance(given, KeyValuePrefix)
    assert (given.placement, given.length) == ("slots", 3)
    assert given.positions == Positions(text_start=0, prefix_takes_positions=False)


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_the_same_seed_and_a_resumed_run_give_the_same_bytes(
    backbone_folder: Folder, records: Path, task: str, tmp_path: Path, reparameterization: str
) -> None:
    names, method = ("one", "two", "broken"), {"reparameterization": reparameterization}
    one, two, broken = (
        settings(backbone_folder("gpt2"), records, tmp_path / name, task=task, method=method) for name in names
    )
    loop.train(one)
    loop.train(two)
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, listener=Interrupted(5))
    loop.train(broken, resume=True)
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_its_file_says_where_it_stands_and_scores(
    made: Path, backbone_folder: Folder, records: Path, tmp_path: Path, capfd: Out
) -> None:
    folder = str(backbone_folder("gpt2"))
    assert run(["inspect", str(made), "--backbone", folder]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert 'placement "slots"' in told
    assert "text starts at 0; the prefix takes no position ids" in told
    assert not compare(save(load(made), tmp_path / "again"), load(made))
    losses = []
    for more in ([], ["--no-prefix"]):
        asked = ["eval", str(made), "--backbone", folder, "--data", str(records), "--json", "--limit", "8", *more]
        assert run([*asked, "--max-new-tokens", "3"]) == 0
        losses.append(json.loads(capfd.readouterr().out)["metrics"]["loss"])
    assert losses[0] != losses[1]


def test_a_file_trained_further_starts_where_it_ended(
    made: Path, backbone_folder: Folder, records: Path, task: str, tmp_path: Path
) -> None:
    """In slots, a prefix that stood before the text is as good a start; the other way there are none to stand in."""
    folder, init = backbone_folder("gpt2"), {"init": f"prefix:{made}"}
    again = prepare(settings(folder, records, tmp_path / "more", task=task, method=init)).method
    start = injection(load(made)).arrays()
    assert all(np.array_equal(array, start[name]) for name, array in again.fold().arrays().items())
    (tmp_path / "document.txt").write_text("blue spice is near river .\nmill is near city .\n")
    cartridge = {"name": "cartridge", "document": str(tmp_path / "document.txt")}
    for method in ({}, {"name": "p-tuning-v2"}, cartridge):
        with pytest.raises(ConfigError, match="expected a prefix before the text; found one in slots"):
            prepare(settings(folder, records, tmp_path / "more", method={**method, **init, "length": 3}))


def test_a_label_is_read_behind_an_infix(backbone_folder: Folder, tmp_path: Path, capfd: Out) -> None:
    """By a head, from the last token, which is no slot."""
    rows = [{"text": f"{'blue' if i % 2 else 'mill'} near", "label": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "head.toml").write_text('answer = "label"\ninput_template = "{text}"\nseparator = "{slot}{slot} is"\n')
    asked = {"task": str(tmp_path / "head.toml"), "eval_data": None, "steps": 40, "optimizer": {"lr": 0.1}}
    config = settings(backbone_folder("gpt2"), tmp_path / "rows.jsonl", tmp_path / "p", method={}, **asked)
    loop.train(config, listener=(heard := Interrupted()))
    assert sum(heard.losses[-5:]) < 0.8 * sum(heard.losses[:5])
    trained = injection(load(tmp_path / "p"))
    infix, head = part_of(trained, KeyValuePrefix), part_of(trained, TaskHead)
    assert infix is not None
    assert head is not None
    other = Combined(parts=(replace(infix, values=tuple(-value for value in infix.values)), head))
    ready = prepare(replace(config, output=str(tmp_path / "other")))
    told, changed = (ready.objective(ready.backbone, ready.batches.batch(0), each) for each in (trained, other))
    assert abs(told - changed) > 0.1
    exported = ["export", "--onnx", str(tmp_path / "p"), "--backbone", str(backbone_folder("gpt2"))]
    assert run([*exported, "-o", str(tmp_path / "out")]) == 2
    assert "expected keys and values before the text; found some in slots of it" in capfd.readouterr().err


@pytest.mark.parametrize("format_", ["--onnx", "--peft"])
def test_no_other_runtime_gets_one(
    made: Path, backbone_folder: Folder, tmp_path: Path, capfd: Out, format_: str
) -> None:
    backbone = ["--backbone", str(backbone_folder("gpt2"))] if format_ == "--onnx" else []
    assert run(["export", str(made), format_, *backbone, "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "slots" in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="expected a prefix before the text; found one in slots of the text"):
        served(load(made), np.dtype(np.float32))


@pytest.mark.parametrize(
    ("family", "text", "method", "told"),
    [
        ("gpt2", 'separator = "{slot}{slot}"', {}, 'expected a separator that ends in text; found .* such as "{slot}'),
        ("gpt2", 'input_template = "{slot}{input}"\nseparator = ""', {}, "a separator that ends in text; found ''"),
        ("gpt2", TASK, {"positions": "none"}, "positions: expected offset for a task with slots; found none"),
        ("falcon", TASK, {}, "falcon: expected an architecture of the attention registry"),
        ("bart", TASK, {}, "expected a task without slots; found 3, on an encoder-decoder; use --method prompt-tuning"),
    ],
)
def test_slots_that_it_cannot_stand_in_are_refused(
    backbone_folder: Folder, records: Path, tmp_path: Path, family: str, text: str, method: dict[str, str], told: str
) -> None:
    (tmp_path / "task.toml").write_text(text)
    folder = folder_of("bart", tmp_path / "bart") if family == "bart" else backbone_folder(family)
    with pytest.raises(InputError, match=told):
        prepare(settings(folder, records, tmp_path / "p", task=str(tmp_path / "task.toml"), method=method))


@torch.no_grad()
def test_a_batch_scores_as_its_rows_do(
    made: Path, backbone_folder: Folder, records: Path, task: str, tmp_path: Path
) -> None:
    """What training minimises, through padding."""
    ready = prepare(settings(backbone_folder("gpt2"), records, tmp_path / "more", task=task, method={}))
    decoder, received = load_decoder(backbone_folder("gpt2")), injection(load(made))
    batch = ready.batches.batch(0)
    total = ready.objective(ready.backbone, batch, received)
    alone = 0.0
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        real = mask.bool()
        logits = decoder.logits(ids[real][None], None, received)[0]
        wanted = labels[real][1:] != -100
        alone -= logits[:-1].log_softmax(-1)[wanted, labels[real][1:][wanted]].sum().item()
    assert abs(total.item() - alone) <= 1e-3
    assert abs(ready.objective(ready.backbone, batch, ready.method()).item() - alone) > 0.1
