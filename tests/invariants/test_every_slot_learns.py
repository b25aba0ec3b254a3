"""No dead slots: the real objective moves every slot that a method trains, and no parameter of a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from prefixkit.backbones.identity import memory_digest
from prefixkit.cli import run
from prefixkit.errors import ConfigError
from prefixkit.injections import EmbeddingPrompt, HiddenPrompt, Injection, KeyValuePrefix, ParameterDelta, parts_of
from prefixkit.methods.catalogue import METHODS, TRAINED
from prefixkit.training import loop
from prefixkit.training.config import TrainConfig
from prefixkit.training.preparation import Prepared, prepare
from tests.invariants.test_bitfit import keys_of
from tests.matrix.families import EXCEPTIONS, FAMILIES, REFUSED, SLOTTED, cell_of

CELLS = [
    (method, family)
    for method in TRAINED
    for family in FAMILIES
    if FAMILIES[family].kind in METHODS[method].backbones and family not in REFUSED
    if (method, family) not in EXCEPTIONS
]
EFFECT = 1e-9
VARIANTS = [
    ("visual-prompt-tuning", "vit", "depth=shallow"),
    ("visual-prompt-tuning", "deit", "location=add"),
    ("p-tuning-v2", "bert", "reparameterization=mlp"),
    ("p-tuning-v2", "roberta", "positions=none"),
    ("bitfit", "roberta", "parameters=layernorm"),
]
ANSWERS = {
    "tags": 'answer = "tags"\ninput_template = "{cls}{tokens}"\n',
    # A null prompt (Logan et al. 2022): the field and the mask.
    "words": 'input_template = "{cls}{text} {mask}"\n[verbalizer]\na = "a"\nb = "b"\n',
}
ON_TEXT = [
    (method, family, answer)
    for answer in ANSWERS
    for method, family in CELLS
    if family in ("bert", "distilbert") and method not in SLOTTED and (method, answer) != ("linear-probe", "words")
]


def prepared(method: str, family: str, path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Prepared:
    """What `prefixkit train` has in its hands before the first step of that cell of the matrix."""
    asked: list[TrainConfig] = []

    def stop_here(config: TrainConfig, **_: Any) -> None:
        asked.append(config)
        raise ConfigError("test", expected="the configuration alone", found="it")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train", stop_here)
        assert run([*cell_of(method, family, path).train, *more]) == 2
    return prepare(asked[0])


def slots(received: Injection) -> dict[str, Tensor]:
    """The trained numbers by name, the first dimension of each counting what must not be dead."""
    named: dict[str, Tensor] = {}
    for part in parts_of(received):
        if isinstance(part, KeyValuePrefix):
            for layer, pair in enumerate(zip(part.keys, part.values, strict=True)):
                named |= {f"{part.place} {layer} {which}": each for which, each in zip("kv", pair, strict=True)}
        elif isinstance(part, HiddenPrompt):
            named |= {f"hidden {layer}": rows for layer, rows in enumerate(part.hidden)}
        elif isinstance(part, EmbeddingPrompt):
            named["prompt"] = part.embeddings
        elif isinstance(part, ParameterDelta):
            named |= dict(part.deltas)
        else:
            named |= {"head": part.weight, "head bias": part.bias}
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def dead(ready: Prepared) -> list[str]:
    """Where the objective of the first batch leaves a slot as it is; biases are looked at in test_bitfit."""
    received = ready.method()
    trained = slots(received)
    for tensor in trained.values():
        tensor.retain_grad()
    ready.objective(ready.backbone, ready.batches.batch(0), received).backward()
    assert trained
    for parameter in ready.method.parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
    # No softmax sees a bias of keys (test_bitfit): its gradient is there, and is rounding or nothing.
    unseen = keys_of({name: each for name, each in trained.items() if name.endswith(".bias")})
    return [name for name, tensor in trained.items() if not learns(tensor) and name not in unseen]


def learns(tensor: Tensor) -> bool:
    """Whether there is a gradient for every slot of [heads, slots, dim] or [slots, hidden], or for a vector."""
    assert tensor.grad is not None
    slots = tensor.grad.abs().amax(dim=-1)
    return bool(((slots.amax(dim=0) if slots.ndim == 2 else slots) > EFFECT).all())


@pytest.mark.parametrize(("method", "family", "more"), [*((*cell, "") for cell in CELLS), *VARIANTS])
def test_every_slot_learns_and_no_weight_does(
    method: str, family: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepared(method, family, tmp_path, monkeypatch, *(["--set", f"method.{more}"] if more else []))
    frozen, weights = memory_digest(ready.backbone.model), list(ready.backbone.model.parameters())
    assert dead(ready) == []
    optimizer = loop.make_optimizer(ready)
    optimizer.zero_grad()
    for step in range(2):
        loop.step(ready, optimizer, ready.batches.batch(step), step)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert held == {id(each) for each in ready.method.parameters()}
    assert not held & {id(weight) for weight in weights}
    assert all(weight.grad is None and not weight.requires_grad for weight in weights)
    assert memory_digest(ready.backbone.model) == frozen


@pytest.mark.parametrize(("method", "family", "answer"), ON_TEXT)
def test_every_slot_learns_from_tags_and_from_words(
    method: str, family: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task.toml").write_text(ANSWERS[answer])
    rows = [
        {"tokens": ["blue", "mill"], "tags": ["O", "B"], "text": "blue mill", "label": "ab"[index % 2]}
        for index in range(32)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["--task", str(tmp_path / "task.toml"), "--data", str(tmp_path / "rows.jsonl")]
    ready = prepared(method, family, tmp_path, monkeypatch, *asked)
    assert dead(ready) == []
    heads = {name for name in slots(ready.method()) if name.startswith(("cls.", "vocab_"))}
    assert bool(heads) == (method == "bitfit" and answer == "words")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_slot_of_an_infix_learns(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task.toml").write_text('input_template = "{slot}{input}"\nseparator = "{slot}{slot}\\n"\n')
    more = ["--task", str(tmp_path / "task.toml"), "--length", "3"]
    ready = prepared("prefix-tuning", family, tmp_path, monkeypatch, *more)
    assert dead(ready) == []
    assert {each.shape[1] for each in slots(ready.method()).values()} == {3}
