"""What a run says it will need is what it needs, and running out of it is told with what would fit."""

from __future__ import annotations

import gc
import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from prefixkit.backbones.kept import Kept
from prefixkit.cli import run as prefixkit
from prefixkit.errors import ConfigError
from prefixkit.prefix import load
from prefixkit.training import checkpoint, loop, memory, side_by_side, validation
from prefixkit.training.free_memory import available, free_memory, left_in_group, left_to_process
from prefixkit.training.memory import Estimate, estimate
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.progress import Silence
from prefixkit.training.sweep import sweep
from tests.small_tokenizer import END, write_folder
from tests.training.every_kind import PAIRS, prepared
from tests.training.live import Live
from tests.training.test_loop import settings
from tests.training.test_sweep import Presses, given

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
TOLERANCE = 0.35
KEEPS = [pair for pair in PAIRS if pair[0] != "linear-probe" and pair[1] in ("gpt2", "bert", "t5", "vit")]
"""No gradient goes from a probe into the layers, so that they keep nothing."""


def measured(run: Prepared, *, shares: bool = False) -> int:
    """The most bytes beside the weights in two steps, the second with the optimizer's state, on the longest rows.

    Rows of one and the same text stand for texts that share nothing, unless it `shares` what they have in common.
    """
    run.backbone.shares_beginnings = shares
    batches = run.batches
    most = min(batches.batch_size, len(batches.examples))
    longest = [min(batches.examples, key=len), *[max(batches.examples, key=len)] * (most - 1)]
    optimizer, model = loop.make_optimizer(run), run.backbone.model
    with Live([*model.parameters(), *model.buffers(), *run.method.parameters()]) as live:
        for _ in range(2):
            loop.step(run, optimizer, batches.collate(longest), 0)
    return live.peak + sum(weight.nbytes for weight in run.method.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "family"), KEEPS)
def test_every_method_needs_what_is_estimated(method: str, family: str, checkpointing: bool, tmp_path: Path) -> None:
    run = prepared(method, family, tmp_path, gradient_checkpointing=checkpointing, batch_size=8)
    needs = estimate(run)
    # Weights in oneDNN's order are none of torch's tensors.
    assert abs((needs.needed - needs.laid_out) / measured(run) - 1) <= TOLERANCE


def test_beginnings_that_are_shared_need_no_more(tmp_path: Path) -> None:
    run = prepared("prefix-tuning", "gpt2", tmp_path, batch_size=8)
    assert measured(run, shares=True) < measured(run)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_an_estimate_leaves_nothing_behind(family: str, checkpointing: bool, tmp_path: Path) -> None:
    method = "prefix-tuning" if family == "t5" else "p-tuning-v2"
    run = prepared(method, family, tmp_path, gradient_checkpointing=checkpointing)
    estimate(run)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        estimate(run)
        assert tensors() == before
    finally:
        gc.enable()


def tensors() -> int:
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rows", "words"), [(2, 12), (24, 12), (6, 200)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_larger_models_on_several_shapes(
    family: str, rows: int, words: int, checkpointing: bool, tmp_path: Path
) -> None:
    size = {"vocab_size": 1200, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(**size, n_embd=128, n_layer=5, n_head=4, n_positions=512)
    llama = LlamaConfig(
        **size,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
    )
    AutoModelForCausalLM.from_config(gpt2 if family == "gpt2" else llama).save_pretrained(tmp_path / "model")
    write_folder(tmp_path / "model", tokenizer_config={"bos_token": END, "eos_token": END})
    lines = [{"input": "river", "target": "mill"}] + [
        {"input": "river " * words, "target": "mill " * (words // 2)}
    ] * rows
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = prepare(
        settings(
            tmp_path / "model",
            tmp_path / "data.jsonl",
            tmp_path / "p",
            batch_size=rows,
            gradient_checkpointing=checkpointing,
        )
    )
    needs = estimate(run)
    assert needs.rows == rows
    model = run.backbone.model
    assert needs.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    # Weights in oneDNN's order are none of torch's tensors.
    assert abs((needs.needed - needs.laid_out) / measured(run) - 1) <= TOLERANCE


def test_an_estimate_changes_nothing(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    one, two = (prepare(settings(backbone_folder("gpt2"), records, tmp_path / name)) for name in ("one", "two"))
    estimate(two)
    assert all(weight.grad is None for weight in two.method.parameters())
    results = [loop.complete(run, resume=False, listener=Silence()).manifest.content for run in (one, two)]
    assert results[0] == results[1]


MIB = 1 << 20
NEEDS = Estimate(
    weights=500 * MIB,
    trained=MIB,
    once=Kept(0, 0, 0),
    row=Kept(plainly=100 * MIB, recomputed=10 * MIB, layer=20 * MIB),
    logits=0,
    rows=16,
    recomputes=False,
    packable=False,
    free=1 << 40,
)


def test_a_step_works_in_the_logits_of_a_part() -> None:
    few, many = (replace(NEEDS, logits=1 << 30, part=part).step(1, recomputes=False) for part in (1 << 24, 1 << 26))
    assert many - few == 12 * ((1 << 26) - (1 << 24))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "use --batch-size 8 or --gradient-checkpointing"),
        ({"free": 700 * MIB}, "use --batch-size 5 or --gradient-checkpointing --batch-size 14"),
        ({"free": 300 * MIB}, "use --batch-size 2 or --gradient-checkpointing --batch-size 6"),
        ({"free": 60 * MIB}, "use --gradient-checkpointing --batch-size 1"),
        ({"free": 300 * MIB, "recomputes": True}, "use --batch-size 6"),
        ({"free": 700 * MIB, "packable": True}, "--gradient-checkpointing --batch-size 14 or --set layout=packed"),
        ({"free": None}, "use --batch-size 8 or --gradient-checkpointing"),
        ({"free": 30 * MIB}, "use shorter texts, --dtype bfloat16 or a smaller backbone"),
    ],
)
def test_advice_is_what_fits(changes: dict[str, Any], told: str) -> None:
    assert replace(NEEDS, **changes).advice().endswith(told)


def test_what_is_told_before_a_run() -> None:
    plenty = "memory: about 1.72 GiB for 16 rows, beside 0.49 GiB of the backbone"
    assert NEEDS.told() == f"{plenty}; 1024.00 GiB free"
    assert replace(NEEDS, free=None).told() == plenty
    short = replace(NEEDS, free=700 * MIB).told()
    assert short.startswith(f"{plenty}; 0.68 GiB free, which may not be enough: use --batch-size 5 or")


class Hears(Silence):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, message: str) -> None:
        self.messages.append(message)


def failing(real: Callable[..., Any], error: Exception, at: int) -> Callable[..., Any]:
    """`real`, which raises `error` when it is called for the `at`th time."""
    calls: list[int] = []

    def step(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*arguments, **keywords)

    return step


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_running_out_keeps_what_was_done_and_says_what_fits(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    straight, broken = (settings(backbone_folder("gpt2"), records, tmp_path / name) for name in ("one", "two"))
    loop.train(straight)
    heard = Hears()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "step", failing(loop.step, error, 6))
        with pytest.raises(
            ConfigError, match=r"memory for a step of 8 rows; found none left; use --batch-size 4 or --gradient-ch"
        ):
            loop.train(broken, listener=heard)
    assert heard.messages[0].startswith("memory: about ")
    assert "stopped at step 5" in heard.messages[-1]
    assert load(tmp_path / "two").manifest.provenance.metrics["steps"] >= 1
    loop.train(replace(broken, gradient_checkpointing=True), resume=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert not checkpoint.path_of(tmp_path / "two").exists()


def test_running_out_before_the_first_step_is_over_writes_nothing(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "step", failing(loop.step, ERRORS[0], 1))
    heard, folder = Hears(), tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ConfigError, match="found none left"):
        loop.train(settings(backbone_folder("gpt2"), records, folder / "p"), listener=heard)
    assert heard.messages[-1] == "stopped before the first step; nothing was written"
    assert not any(folder.iterdir())


def test_running_out_in_a_validation_does_it_again(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = (settings(backbone_folder("gpt2"), records, tmp_path / name) for name in ("one", "two"))
    loop.train(straight)
    with monkeypatch.context() as patched:
        patched.setattr(validation, "mean_loss", failing(validation.mean_loss, ERRORS[0], 2))
        with pytest.raises(ConfigError, match="found none left"):
            loop.train(broken)
    loop.train(broken, resume=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_where_nothing_can_be_measured_the_run_is_tried_all_the_same(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "kept", failing(memory.kept, ERRORS[0], 1))
    asked, heard = settings(backbone_folder("gpt2"), records, tmp_path / "p", steps=2), Hears()
    loop.train(asked, listener=heard)
    assert heard.messages == ["memory: too little to measure what a step will need"]
    monkeypatch.setattr(memory, "kept", failing(memory.kept, ERRORS[0], 1))
    monkeypatch.setattr(loop, "step", failing(loop.step, ERRORS[0], 1))
    with pytest.raises(ConfigError, match="use a smaller --batch-size or --gradient-checkpointing"):
        loop.train(asked)


def test_other_faults_stay_what_they_are(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "step", failing(loop.step, RuntimeError("shapes differ"), 2))
    with pytest.raises(RuntimeError, match="shapes differ"):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p"))


def test_the_command_line_says_it_in_one_line(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    monkeypatch.setattr(loop, "step", failing(loop.step, ERRORS[0], 3))
    command = ["train", "--backbone", str(backbone_folder("gpt2")), "--data", str(records), "--length", "2", "--json"]
    assert prefixkit([*command, "--steps", "5", "-o", str(tmp_path / "p")]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert "memory: about" in told.err
    assert told.err.splitlines()[-1].startswith("prefixkit: training: expected memory for a step of 16 rows")


def test_a_sweep_that_runs_out_goes_on_later(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, grid = given(backbone_folder("gpt2"), records), {"seed": [0, 1]}
    whole = sweep(asked, grid, tmp_path / "whole")
    heard = Presses()
    with monkeypatch.context() as patched:
        patched.setattr(side_by_side, "step", failing(side_by_side.step, ERRORS[0], 6))
        told = "sweep: expected memory for a pass of 16 rows; found none left; use --batch-size 4 or --gradient-ch"
        with pytest.raises(ConfigError, match=told):
            sweep(asked, grid, tmp_path / "parts", listener=heard)
    assert heard.messages[0].startswith("memory: about ")
    assert heard.messages[-1].startswith("stopped; --resume goes on")
    again = sweep(asked, grid, tmp_path / "parts", resume=True)
    assert [trial.score for trial in again] == [trial.score for trial in whole]


def test_free_memory_is_that_of_the_machine_its_container_or_the_process(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert available(tmp_path / "meminfo") == 64 << 10
    assert available(tmp_path / "missing") is None
    assert left_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert left_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert left_in_group(tmp_path) == 300
    (tmp_path / "statm").write_text("3 1 1 1 0 1 0\n")
    (tmp_path / "limits").write_text("Max address space         unlimited            unlimited            bytes\n")
    assert left_to_process(tmp_path) is None
    (tmp_path / "limits").write_text("Max address space         1048576              unlimited            bytes\n")
    assert left_to_process(tmp_path) == 1048576 - 3 * mmap.PAGESIZE
    assert free_memory(torch.device("meta")) is None
