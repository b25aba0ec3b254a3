"""Training: it learns, it stays frozen, it repeats itself, and it resumes, each to the byte."""

from __future__ import annotations

import json
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.errors import ConfigError, DataError, InputError, MismatchError, PrefixkitError
from prefixkit.format.manifest import Positions
from prefixkit.prefix import load
from prefixkit.training import checkpoint, loop
from prefixkit.training.config import TrainConfig, from_mapping
from prefixkit.training.interruption import AtOnce
from prefixkit.training.progress import Silence, Step, Validation

Folder = Callable[..., Path]


class Interrupted(Silence):
    """Presses Ctrl-C after `step` steps, and keeps what it hears."""

    def __init__(self, step: int = -1) -> None:
        self.at, self.losses, self.validations, self.messages = step, [], [], []

    def on_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        if step.step == self.at:
            raise KeyboardInterrupt

    def on_validation(self, validation: Validation) -> None:
        self.validations.append(validation)

    def on_message(self, message: str) -> None:
        if not message.startswith("memory:"):  # it says what is free, which is another number each time
            self.messages.append(message)


def settings(folder: Path, records: Path, output: Path | str, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "backbone": str(folder),
        "data": str(records),
        "eval_data": str(records),
        "output": str(output),
        "steps": 12,
        "batch_size": 8,
        "method": {"length": 4},
        "optimizer": {"lr": 0.1},
        "evaluation": {"every": 4},
    }
    return from_mapping({**given, **changes})


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_falls(
    backbone_folder: Folder, records: Path, tmp_path: Path, family: str, reparameterization: str
) -> None:
    method = {"length": 4, "reparameterization": reparameterization}
    lr = {"lr": 0.1 if reparameterization == "none" else 0.01}
    heard = Interrupted()
    config = settings(backbone_folder(family), records, tmp_path / "p", method=method, optimizer=lr, steps=60)
    prefix = loop.train(config, listener=heard)
    # The backbone is random: its prefix can make words likelier, not right.
    assert sum(heard.losses[-5:]) < 0.95 * sum(heard.losses[:5])
    assert prefix.manifest.provenance.metrics["validation_loss"] == min(v.loss for v in heard.validations)
    assert load(tmp_path / "p").manifest.content == prefix.manifest.content
    assert not checkpoint.path_of(tmp_path / "p").exists()


def test_same_seed_gives_the_same_bytes(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    for output, seed in ((one, 3), (two, 3), (other, 4)):
        loop.train(settings(backbone_folder("gpt2"), records, output, seed=seed))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
@pytest.mark.parametrize("at", [1, 6, 8])
def test_resumed_run_ends_with_the_same_bytes(
    backbone_folder: Folder, records: Path, tmp_path: Path, at: int, reparameterization: str
) -> None:
    method = {"length": 4, "reparameterization": reparameterization, "init": "random"}
    straight = settings(backbone_folder("gpt2"), records, tmp_path / "straight", method=method)
    broken = settings(backbone_folder("gpt2"), records, tmp_path / "broken", method=method)
    loop.train(straight)
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, listener=(heard := Interrupted(at)))
    assert load(tmp_path / "broken").manifest.provenance.method == "prefix-tuning"
    assert f"stopped at step {at}" in heard.messages[0]
    loop.train(broken, resume=True)
    assert (tmp_path / "straight").read_bytes() == (tmp_path / "broken").read_bytes()


def test_signal_in_the_middle_of_a_step_waits_for_its_end(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = (settings(backbone_folder("gpt2"), records, tmp_path / name) for name in ("one", "two"))
    loop.train(straight)
    real, calls = torch.optim.AdamW.step, []

    def signalled(self: torch.optim.AdamW, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalled)
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken)
    assert load(tmp_path / "two").manifest.provenance.metrics["steps"] == 4
    loop.train(broken, resume=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_resume_refuses_another_run(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    output = tmp_path / "p"
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings(backbone_folder("gpt2"), records, output), listener=Interrupted(2))
    with pytest.raises(ConfigError, match="batch_size = 8 as when the run began; found 4"):
        loop.train(settings(backbone_folder("gpt2"), records, output, batch_size=4), resume=True)
    with pytest.raises(ConfigError, match=r"backbone weights = 'b3t-v1"):
        loop.train(settings(backbone_folder("gpt2", 1), records, output), resume=True)
    other = {"name": "prompt-tuning", "length": 4}
    with pytest.raises(ConfigError, match=r"method\.name = 'prefix-tuning' as when the run began"):
        loop.train(settings(backbone_folder("gpt2"), records, output, method=other), resume=True)
    with pytest.raises(ConfigError, match="expected a checkpoint to resume; found none"):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "q"), resume=True)
    checkpoint.path_of(output).write_bytes(b"PK broken")
    with pytest.raises(ConfigError, match="expected a readable checkpoint; found a damaged one"):
        loop.train(settings(backbone_folder("gpt2"), records, output), resume=True)


def test_resume_refuses_a_checkpoint_with_a_flipped_bit(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    config = settings(backbone_folder("gpt2"), records, tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, listener=Interrupted(2))
    path = checkpoint.path_of(config.output)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    stored = bytearray(path.read_bytes())
    # Within the numbers of a tensor, behind the entry's header and its padding.
    stored[largest.header_offset + largest.file_size] ^= 1
    path.write_bytes(stored)
    with pytest.raises(ConfigError, match="expected a readable checkpoint; found a damaged one"):
        loop.train(config, resume=True)


def test_resume_refuses_files_that_were_edited(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    task, held_out = tmp_path / "t.toml", tmp_path / "valid.jsonl"
    task.write_text('separator = " =>"')
    held_out.write_text(records.read_text())
    config = settings(backbone_folder("gpt2"), records, tmp_path / "p", task=str(task), eval_data=str(held_out))
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, listener=Interrupted(2))
    held_out.write_text(records.read_text().splitlines()[0])
    with pytest.raises(ConfigError, match="validation data = 'b3-v1"):
        loop.train(config, resume=True)
    held_out.write_text(records.read_text())
    task.write_text('separator = " ->"')
    with pytest.raises(ConfigError, match="task contract = "):
        loop.train(config, resume=True)
    task.write_text('separator = " =>"')
    loop.train(config, resume=True)


def test_interrupt_in_a_validation_changes_nothing(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    class InValidation(Silence):
        def on_validation(self, validation: Validation) -> None:
            if validation.step == 8:
                raise KeyboardInterrupt

    straight, broken = (settings(backbone_folder("gpt2"), records, tmp_path / name) for name in ("one", "two"))
    loop.train(straight)
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, listener=InValidation())
    loop.train(broken, resume=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_second_signal_stops_at_once_and_writes_nothing(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", twice)
    with pytest.raises(AtOnce):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p"), listener=(heard := Interrupted()))
    assert "finishing this step" in heard.messages[0]
    assert list(tmp_path.iterdir()) == []


def test_diverging_run_stops_and_says_why(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a finite loss; found nan at step \d+; lower --lr"):
        loop.train(
            settings(backbone_folder("gpt2"), records, tmp_path / "p", optimizer={"lr": 1e6}, dtype="float16", steps=9)
        )
    assert not (tmp_path / "p").exists()


def test_provenance_names_the_learning_rate_that_was_used(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    silent, spoken = (
        settings(backbone_folder("gpt2"), records, tmp_path / name, optimizer=lr)
        for name, lr in (("one", {}), ("two", {"lr": 0.1}))
    )
    assert loop.train(silent).manifest.provenance.config["optimizer"]["lr"] == 0.1
    loop.train(spoken)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_positions_that_the_backbone_cannot_give_are_refused(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    method = {"length": 4, "positions": "none"}
    with pytest.raises(InputError, match="bloom: expected text that starts at 4"):
        loop.train(settings(backbone_folder("bloom"), records, tmp_path / "p", method=method))
    prefix = loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", method=method, steps=1))
    assert prefix.manifest.injections[0].positions == Positions(text_start=0, prefix_takes_positions=False)


def test_bos_in_the_prefix_stays_what_it_is(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    task = tmp_path / "t.toml"
    task.write_text('bos = "before"')
    start, end = (
        loop.train(settings(backbone_folder("llama"), records, tmp_path / "p", task=str(task), steps=steps))
        for steps in (0, 3)
    )
    assert end.manifest.injections[0].frozen_slots == 1
    for name, array in end.tensors.items():
        assert (array[:, 0] == start.tensors[name][:, 0]).all()
        assert (array[:, 1:] != start.tensors[name][:, 1:]).any()


def test_output_never_replaces_an_input(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(records.read_text())
    folder = backbone_folder("gpt2")
    with pytest.raises(ConfigError, match="found an input of this run"):
        loop.train(settings(folder, data, data))
    with pytest.raises(ConfigError, match="expected a place outside the backbone's folder"):
        loop.train(settings(folder, data, folder / "model.safetensors"))
    with pytest.raises(ConfigError, match="found a device"):
        loop.train(settings(folder, data, "/dev/null"))
    with pytest.raises(ConfigError, match="File name too long"):
        loop.train(settings(folder, data, tmp_path / ("p" * 250)))
    assert data.read_text() == records.read_text()


def test_backbone_that_moves_is_caught(
    backbone_folder: Folder, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.step

    def thawed(prepared: Any, *rest: Any) -> float:
        with torch.no_grad():
            next(prepared.backbone.model.parameters()).add_(1e-3)
        return real(prepared, *rest)

    monkeypatch.setattr(loop, "step", thawed)
    with pytest.raises(PrefixkitError, match="expected frozen weights; found weights that changed"):
        loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", steps=1))
    assert not (tmp_path / "p").exists()


def test_zero_steps_write_the_initial_prefix(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    prefix = loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", steps=0, method={"length": 4}))
    assert "training_loss" not in prefix.manifest.provenance.metrics
    again = loop.train(
        settings(
            backbone_folder("gpt2"),
            records,
            tmp_path / "q",
            steps=0,
            method={"length": 4, "init": f"prefix:{tmp_path / 'p'}"},
        )
    )
    assert again.manifest.provenance.parents == (load(tmp_path / "p").manifest.content,)
    assert all((again.tensors[name] == array).all() for name, array in prefix.tensors.items())


def test_start_from_a_prefix_of_another_backbone_is_refused(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    loop.train(settings(backbone_folder("gpt2"), records, tmp_path / "p", steps=0))
    method = {"length": 4, "init": f"prefix:{tmp_path / 'p'}"}
    with pytest.raises(MismatchError):
        loop.train(settings(backbone_folder("gpt2", 1), records, tmp_path / "q", method=method))


def test_early_stopping_keeps_the_best(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    heard = Interrupted()
    config = settings(
        backbone_folder("gpt2"),
        records,
        tmp_path / "p",
        steps=200,
        optimizer={"lr": 30.0},
        evaluation={"every": 2, "patience": 3},
    )
    prefix = loop.train(config, listener=heard)
    assert len(heard.losses) < 200
    assert "stopped early" in heard.messages[-1]
    best = min(heard.validations, key=lambda one: one.loss)
    assert prefix.manifest.provenance.metrics == {"steps": best.step, "validation_loss": best.loss}


def test_sum_and_mean_differ_by_the_token_count(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    config = settings(backbone_folder("gpt2"), records, tmp_path / "p")
    prepared = loop.prepare(config)
    batch = prepared.batches.batch(0)
    total = prepared.objective(prepared.backbone, batch, prepared.method())
    mean = loop.reduced(total, how="mean", tokens=batch.target_tokens, examples=8)
    summed = loop.reduced(total, how="sum", tokens=batch.target_tokens, examples=8)
    assert summed.item() == pytest.approx(mean.item() * batch.target_tokens / 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"length": 200}}, "--length: expected a prefix shorter than the context of 128 tokens; found 200"),
        ({"method": {"init": "txt"}}, "--init: expected text or text:WORDS"),
        ({"method": {"init": "random:3"}}, "--init: expected text or text:WORDS"),
        ({"data": "/nowhere/train.jsonl"}, "/nowhere/train.jsonl"),
        ({"backbone": "/nowhere/model"}, "/nowhere/model: expected a folder"),
        ({"output": "/nowhere/out"}, "expected an existing folder"),
        ({"task": "e2"}, "did you mean 'e2e'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    backbone_folder: Folder, records: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        loop.train(settings(backbone_folder("gpt2"), records, **{"output": tmp_path / "p", **changes}))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_the_state_would_be_is_refused_at_once(
    backbone_folder: Folder, records: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.checkpoint").mkdir()
    with pytest.raises(ConfigError, match=r"p\.checkpoint: expected a file, or none; found a folder"):
        loop.prepare(settings(backbone_folder("gpt2"), records, tmp_path / "p"))
    assert [path.name for path in tmp_path.iterdir()] == ["p.checkpoint"]


def test_malformed_line_is_named(backbone_folder: Folder, records: Path, tmp_path: Path) -> None:
    lines = records.read_text().splitlines()
    lines[16] = '{"input": "a"'
    broken = tmp_path / "train.jsonl"
    broken.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train\.jsonl:17"):
        loop.train(settings(backbone_folder("gpt2"), broken, tmp_path / "p"))


def test_example_longer_than_the_context_keeps_its_target(
    backbone_folder: Folder, tmp_path: Path, records: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input": "x " * 400, "target": "the river"}) + "\n")
    config = settings(backbone_folder("gpt2"), path, tmp_path / "p", eval_data=None, steps=1)
    loop.train(config, listener=(heard := Interrupted()))
    assert heard.messages == ["1 of 1 training examples lost the end of their input to fit 124 tokens"]
    prepared = loop.prepare(config)
    batch = prepared.batches.batch(0)
    assert batch.input_ids.shape[1] <= 128 - 4
    assert batch.labels[0, -4:].tolist() == batch.input_ids[0, -4:].tolist()
    assert batch.target_tokens == 4
