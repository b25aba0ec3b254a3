"""The training measurements as a program: every case runs, on a stand-in, and compares equal work."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.data.batches import TrainingBatches
from prefixkit.quickstart import E2E
from tests.bench import fresh, speed, train, wall
from tests.bench.contenders import OURS_COMPILED, PEERS, Ours, PeftCompiled, Shuffled, plain_model
from tests.bench.rounds import Row
from tests.bench.shapes import Setting, examples
from tests.bench.speed import AGREE, BEST, COMPILED, Amount

# PEFT asks transformers in words that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = {
    *("h200-gpt2m-b64", "h200-qwen06-b64", "h200-gpt2m-b10", "h200-qwen06-b10", "h200-e2e-wall"),
    *("h200-qwen06-sweep16", "h200-qwen06-roof", "h200-8b-fit", "cpu-gpt2-30m-b16", "cpu-sweep8"),
}
AMOUNT = Amount(1, 1, 2, 1, compiled=False, epochs=0.02, held_out=4, prefixes=2)
RECORD = {"case", "metric", "ours", "peer", "peer_name", "ratio", "spread"}


def options() -> Namespace:
    valid = E2E / "valid.jsonl"
    return Namespace(
        quick=True, backbone=None, data=valid, eval_data=valid, rounds=1, steps=1, threads=1, compile="auto"
    )


def setting_of(name: str, tmp_path: Path) -> Setting:
    return train.setting_of(train.CASES[name], options(), tmp_path)


def check(rows: list[Row], case: str) -> None:
    """What every row of every bench has."""
    for row in rows:
        assert set(row.record()) == RECORD
        assert row.case == case
        assert row.ours > 0
        assert row.spread[0] <= row.ratio <= row.spread[1]
        assert math.isclose(row.ratio, row.ours / row.peer)


def test_all_are_there() -> None:
    assert set(train.CASES) == NAMES


@pytest.mark.parametrize(
    "name", ["h200-qwen06-roof", "h200-8b-fit", pytest.param("h200-qwen06-sweep16", marks=pytest.mark.matrix)]
)
def test_a_case_runs_on_a_stand_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "QUICK", AMOUNT)
    rows = train.measure(name, options(), tmp_path)
    assert len(rows) >= 2
    check(rows, name)


def test_the_weights_of_a_backbone_that_is_made_on_the_device_are_not_written(tmp_path: Path) -> None:
    shape = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 8192}
    case = replace(train.CASES["h200-8b-fit"], shape=shape)
    given = train.setting_of(case, Namespace(**{**vars(options()), "quick": False}), tmp_path)
    assert (given.layout, given.device, given.spread) == ("packed", "cuda", 0.0)
    assert (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("*.safetensors"))
    assert {len(row) for row in examples(given)} == {512}


def test_peers_read_the_same_examples_in_padded_rows(tmp_path: Path) -> None:
    setting = setting_of("h200-gpt2m-b10", tmp_path)
    ours = Ours(setting, examples(setting))
    assert setting.layout == "packed"
    assert ours.prepared.batches.batch(0).input_ids.shape[0] == 1
    assert isinstance(ours.plan, TrainingBatches)
    assert ours.plan.order == "random"
    start, model = ours.prefix, plain_model(setting)
    losses = [float(ours.step(number).loss) for number in range(2)]
    for kind in PEERS.values():
        if kind is not PeftCompiled:
            peer = kind(setting, model, ours.plan, start)
            found = [float(peer.step(number).loss) for number in range(2)]
            assert found == pytest.approx(losses, rel=AGREE["float32"])


def test_every_contender_has_its_own_order_once_losses_agree(tmp_path: Path) -> None:
    setting = setting_of("h200-gpt2m-b10", tmp_path)
    found = speed._Contenders(setting, replace(AMOUNT, compiled=False), lambda message: None)
    ours, peers = found.all["ours"], [found.all[name] for name in ("PEFT", BEST, "bare loop")]
    assert all(peer.plan is ours.plan for peer in peers)
    found.choose_best(1)
    assert ours.prepared.batches.order == "random"
    assert [type(peer.plan) for peer in peers] == [Shuffled, TrainingBatches, TrainingBatches]
    assert all(peer.plan.order == "length" for peer in peers[1:])


def test_ours_compiled_reads_the_batches_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(setting: Setting, rows: Any) -> Ours:
        layout = "padded" if setting.compile == "on" else setting.layout
        return Ours(replace(setting, compile="off", layout=layout), rows)

    monkeypatch.setattr(speed, "Ours", uncompiled)
    monkeypatch.setattr(speed, "PEERS", {})
    setting = setting_of("cpu-gpt2-30m-b16", tmp_path)
    found = speed._Contenders(setting, replace(AMOUNT, compiled=True), lambda message: None).all
    ours, compiled = (found[name].prepared.batches for name in ("ours", OURS_COMPILED))
    assert ours.order == compiled.order == "beginnings"


@pytest.mark.parametrize(
    ("more", "told"), [(["--json", "/nowhere/speed.json"], "found no /nowhere"), (["--rounds", "0"], "at least 1")]
)
def test_what_would_fail_after_the_last_round_is_refused_before_the_first(
    more: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--cases", "cpu-sweep8", *more])
    monkeypatch.setattr(train, "measure", None)
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert told in capsys.readouterr().err


def test_memory_is_that_of_the_largest_batches_in_the_rows_that_are_read(tmp_path: Path) -> None:
    setting = setting_of("h200-gpt2m-b10", tmp_path)
    for contender in ("ours", BEST):
        built = fresh.build(setting, contender)
        batches = built.prepared.batches if isinstance(built, Ours) else built.plan
        small, *large = fresh.largest(built)
        most = max(batches.batch(step).labels.numel() for step in range(len(batches.examples) // setting.batch_size))
        assert batches.batch(small).labels.numel() < batches.batch(large[-1]).labels.numel() == most


CURVES: dict[str, wall.Curve] = {
    "ours": [(2.0, 3.0), (3.0, 1.9), (4.0, 2.1)],
    "PEFT": [(4.0, 3.0), (8.0, 2.5), (12.0, 2.0)],
    BEST: [(3.0, 3.0), (6.0, 2.0), (9.0, 1.8)],
    COMPILED: [(5.0, 3.0), (5.5, 2.0), (6.0, 1.7)],
}


def walled(curves: dict[str, wall.Curve], amount: Amount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    def known(_: Setting, name: str, *__: Any) -> wall.Curve:
        if name not in curves:
            raise RuntimeError("no compiler")
        return curves[name]

    monkeypatch.setattr(wall, "in_a_process", known)
    return wall.measure("h200-e2e-wall", setting_of("h200-e2e-wall", tmp_path), amount, lambda message: None)


def test_the_clock_stops_at_the_loss_that_plain_peft_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = walled(CURVES, replace(AMOUNT, compiled=True), tmp_path, monkeypatch)
    assert [(row.peer_name, row.ours, row.peer) for row in rows[:2]] == [("PEFT", 3.0, 12.0), (BEST, 3.0, 5.5)]
    assert [row.peer for row in rows[2:]] == [2.0, 1.7]
    uncompiled = {name: curve for name, curve in CURVES.items() if name != COMPILED}
    assert walled(uncompiled, replace(AMOUNT, compiled=True), tmp_path, monkeypatch)[1].peer == 6.0


def test_who_never_gets_there_took_all_its_time_and_for_ours_that_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: Any = [(3.0, 3.0), (9.0, 2.2)]
    assert walled({**CURVES, BEST: slow}, AMOUNT, tmp_path, monkeypatch)[1].peer == 9.0
    with pytest.raises(SystemExit, match=r"ours ends at 2\.2000, PEFT at 2\.0000"):
        walled({**CURVES, "ours": slow}, AMOUNT, tmp_path, monkeypatch)


def test_all_run_on_the_wall_clock_from_the_same_prefix(tmp_path: Path) -> None:
    setting, start = setting_of("h200-e2e-wall", tmp_path), tmp_path / "start.pt"
    torch.save(Ours(setting, None).prefix, start)
    ours, best = (wall.curve(setting, name, 2, 4, start) for name in ("ours", BEST))
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in best], rel=1e-3)
    assert 0 < ours[0][0] < ours[1][0]
