"""Before the first step: what compiles is compiled once and changes no loss, what does not is left alone and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from prefixkit.data.batches import EncodedExample, TrainingBatches
from prefixkit.errors import ConfigError
from prefixkit.prefix import load
from prefixkit.training import layout, loop, warm_up
from prefixkit.training.processes import ALONE
from prefixkit.training.sweep import sweep
from tests.compiling import COMPILING
from tests.training.test_loop import Interrupted, settings
from tests.training.test_sweep import Presses, given

Folder = Callable[..., Path]
pytestmark = COMPILING


def run(folder: Path, records: Path, output: Path, **given: Any) -> Interrupted:
    heard = Interrupted()
    loop.train(settings(folder, records, output, **given), listener=heard)
    return heard


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_compiled_run_is_the_same_run(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(warm_up, "BACKEND", counter)
    folder = backbone_folder("gpt2")
    plain = run(folder, records, tmp_path / "plain", compile="off", layout=layout)
    compiled = run(folder, records, tmp_path / "compiled", compile="on", layout=layout)
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-5 * max(plain.losses))
    compiled_graphs = [graph for graph in counter.graphs if graph.graph.nodes]
    assert len(compiled_graphs) == 1, "rows of every length, and no validation"
    assert plain.validations
    assert [message.split(" in ")[0] for message in compiled.messages][1:] == ["compiled"]
    configs = [load(tmp_path / name).manifest.provenance.config for name in ("plain", "compiled")]
    assert configs[0] == configs[1], "how it was computed is no part of what was trained"


def failing(*_: Any) -> Any:
    raise RuntimeError("no compiler here\nand more")


def wrong(module: torch.fx.GraphModule, _: Any) -> Any:
    return lambda *given: tuple(one * 1.5 if isinstance(one, torch.Tensor) else one for one in module(*given))


@pytest.mark.parametrize(("backend", "reason"), [(failing, "no compiler here"), (wrong, "the first batch has a loss")])
def test_what_does_not_work_is_said_and_left_alone(
    backbone_folder: Folder,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(warm_up, "BACKEND", backend)
    folder = backbone_folder("gpt2")
    with pytest.raises(ConfigError, match=f"--compile: .*{reason}"):
        run(folder, records, tmp_path / "forced", compile="on")
    assert not list(tmp_path.glob("forced*"))
    plain = run(folder, records, tmp_path / "plain", compile="off")
    monkeypatch.setattr(warm_up, "pays", lambda *_: True)
    left = run(folder, records, tmp_path / "left")
    assert left.messages[-1].startswith("not compiled: ")
    assert reason in left.messages[-1]
    assert left.losses == plain.losses


def test_what_cannot_be_compiled_is_refused_before(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="falcon takes a prefix through a cache"):
        run(backbone_folder("falcon"), records, tmp_path / "out", compile="on")
    with pytest.raises(ConfigError, match="--compile on: expected one without --gradient-checkpointing"):
        run(backbone_folder("gpt2"), records, tmp_path / "out", compile="on", gradient_checkpointing=True)


def test_a_cpu_is_left_alone_by_default(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    assert run(backbone_folder("gpt2"), records, tmp_path / "out").messages == []


@pytest.mark.parametrize(("batch_size", "mode"), [(4, "reduce-overhead"), (40, "reduce-overhead"), (48, None)])
@pytest.mark.parametrize("seed", range(4))
def test_cuda_graphs_are_for_runs_of_small_batches(seed: int, batch_size: int, mode: str | None) -> None:
    """Whichever of them comes first: lengths are far apart, and 92 in the mean."""
    examples = [EncodedExample((1,) * length, (2,)) for length in (19, 19, 19, 19, 379)] * 100
    batches = TrainingBatches(examples, batch_size=batch_size, seed=seed)
    prepared: Any = SimpleNamespace(batches=batches, group=ALONE)
    backbone: Any = SimpleNamespace(device=torch.device("cuda"))
    assert warm_up._mode(backbone, prepared, beside=False) == mode
    assert warm_up._mode(backbone, prepared, beside=True) is None


def test_trials_that_are_packed_stand_or_fall_with_the_first_of_them(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial is not packed, the second is tried for all that are; side by side, as they will be."""
    monkeypatch.setattr(layout, "_packs_faster", lambda backbone: True)
    asked, heard = given(backbone_folder("gpt2"), records), Presses()
    grid = {"method": [{"name": "bitfit"}, {"length": 3}, {"length": 4}]}
    found = sweep(asked, grid, tmp_path / "packed")
    assert [layout.packs(trial.prepared.batches.collate) for trial in found] == [False, True, True]
    monkeypatch.setattr(layout, "laid_each", failing)
    left = sweep(asked, grid, tmp_path / "padded", listener=heard)
    assert not any(layout.packs(trial.prepared.batches.collate) for trial in left)
    assert heard.messages[-1] == "batches are padded: RuntimeError: no compiler here and more"
    for one, other in zip(left, found, strict=True):
        assert one.state.best_loss == pytest.approx(other.state.best_loss, rel=1e-4)
