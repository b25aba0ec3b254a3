"""Prefix files in a folder: added, replaced and dropped while the server runs, and refused where they do not fit."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.prefix import Prefix, load, save
from prefixkit.serving.http import prefix_folder
from prefixkit.serving.http.catalogue import Catalogue
from prefixkit.serving.http.prefix_folder import PrefixFolder
from prefixkit.serving.session import Session
from prefixkit.serving.worker import Worker
from tests.exported import backbone, exported, random_prefix
from tests.serving.http.client import eventually, serving
from tests.serving.scripted_engine import ScriptedEngine


@pytest.fixture
def session() -> Session:
    """One of its own, as its prefixes change."""
    return Session(exported("gpt2").folder, device="cpu", threads=1)


def prefix(seed: int = 2, length: int = 3) -> Prefix:
    return random_prefix(load_backbone(backbone("gpt2")).identity, seed=seed, length=length)


def looking(session: Session, folder: Path, use: Callable[[PrefixFolder, Catalogue], Awaitable[None]]) -> None:
    async def run() -> None:
        worker, catalogue = Worker(ScriptedEngine(session)), Catalogue(session.report, session.tokenizer)
        worker.start()
        try:
            await use(PrefixFolder(folder, worker, catalogue), catalogue)
        finally:
            await worker.close()

    asyncio.run(run())


def names(session: Session, catalogue: Catalogue) -> list[str]:
    """Of all prefixes, which the session must have too."""
    listed = [model.name for model in catalogue.models if model.prefix is not None]
    assert set(listed) == session.prefixes.keys()
    return listed


def test_files_are_added_replaced_and_dropped(session: Session, tmp_path: Path) -> None:
    save(prefix(), tmp_path / "one.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        assert names(session, catalogue) == ["own", "one"]
        save(prefix(seed=3), tmp_path / "two.safetensors")
        await folder.look()
        assert names(session, catalogue) == ["own", "one", "two"]
        changed = save(prefix(seed=4, length=5), tmp_path / "one.safetensors")
        await folder.look()
        assert session.prefixes["one"].length == 5
        assert catalogue.find("one").manifest.content == changed.manifest.content
        (tmp_path / "one.safetensors").unlink()
        await folder.look()
        assert names(session, catalogue) == ["own", "two"]

    looking(session, tmp_path, use)


def test_a_bad_file_is_told_once_and_the_old_one_stays(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one.safetensors"
    good = save(prefix(), path)

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        path.write_bytes(path.read_bytes()[:-10])
        for _ in range(3):
            await folder.look()
        assert [record.message for record in caplog.records if "one.safetensors is refused" in record.message] == [
            caplog.records[-1].message
        ]
        assert "the one before stays" in caplog.records[-1].message
        assert catalogue.find("one").manifest.content == good.manifest.content
        save(prefix(seed=9, length=4), path)
        await folder.look()
        assert session.prefixes["one"].length == 4
        path.unlink()
        await folder.look()
        assert names(session, catalogue) == ["own"]

    with caplog.at_level(logging.INFO):
        looking(session, tmp_path, use)


def test_a_prefix_of_another_backbone_is_refused(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = prefix()
    other = replace(made.manifest.backbone, weights_hash=made.manifest.backbone.weights_hash[:-1] + "x")
    other = replace(
        other, weights_hash=other.weights_hash[:-1] + ("0" if made.manifest.backbone.weights_hash[-1] != "0" else "1")
    )
    save(Prefix(replace(made.manifest, backbone=other), made.tensors), tmp_path / "other.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        assert names(session, catalogue) == ["own"]

    looking(session, tmp_path, use)
    assert "other.safetensors is refused: prefix for " in caplog.text
    assert "weights" in caplog.text


def test_what_its_header_refuses_is_not_read(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = prefix()
    other = replace(made.manifest.backbone, config_hash="b3-v1:" + "0" * 64)
    save(Prefix(replace(made.manifest, backbone=other), made.tensors), tmp_path / "other.safetensors")
    save(prefix(length=64), tmp_path / "long.safetensors")
    save(prefix(), tmp_path / "good.safetensors")
    read: list[str] = []

    def reading(path: Path) -> Prefix:
        read.append(path.stem)
        return load(path)

    monkeypatch.setattr(prefix_folder, "load", reading)

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        assert names(session, catalogue) == ["own", "good"]

    looking(session, tmp_path, use)
    assert read == ["good"]
    assert "other.safetensors is refused: prefix for " in caplog.text


def test_a_prefix_that_leaves_no_room_is_refused(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(prefix(length=63), tmp_path / "short.safetensors")
    save(prefix(length=64), tmp_path / "long.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        assert names(session, catalogue) == ["own", "short"]

    looking(session, tmp_path, use)
    (told,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("long.safetensors is refused: ")
    assert "expected a prefix that leaves room in a row of 64 slots; found one of 64; start with" in told


def test_the_shared_prefix_needs_no_room_in_rows(session: Session, tmp_path: Path) -> None:
    save(prefix(length=64), tmp_path / "long.safetensors")

    async def run() -> None:
        engine = ScriptedEngine(session)
        engine.shared = "long"
        worker, catalogue = Worker(engine), Catalogue(session.report, session.tokenizer)
        worker.start()
        try:
            await PrefixFolder(tmp_path, worker, catalogue).look()
            assert names(session, catalogue) == ["own", "long"]
        finally:
            await worker.close()

    asyncio.run(run())


def test_names_that_are_taken_are_refused(session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = session.prefixes["own"]
    save(prefix(), tmp_path / "own.safetensors")
    save(prefix(), tmp_path / f"{session.report.backbone.name}.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        assert names(session, catalogue) == ["own"]
        assert session.prefixes["own"] is before

    looking(session, tmp_path, use)
    assert caplog.text.count("expected a name of its own; found that of another model") == 2


def test_names_that_cannot_be_shown_are_refused_once(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b\x1b", "line\n", os.fsdecode(b"\xff")):
        save(prefix(), tmp_path / "good.safetensors")
        (tmp_path / "good.safetensors").rename(tmp_path / f"{name}.safetensors")
    save(prefix(), tmp_path / "good.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        for _ in range(2):
            await folder.look()
        assert names(session, catalogue) == ["own", "good"]

    looking(session, tmp_path, use)
    assert caplog.text.count("expected a name of printable characters in UTF-8") == 3


def test_what_is_no_prefix_file_is_left_alone(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".one.safetensors").write_text("x")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        assert names(session, catalogue) == ["own"]

    looking(session, tmp_path, use)
    assert caplog.text == ""


def test_a_folder_that_goes_leaves_what_it_held(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_path = tmp_path / "prefixes"
    folder_path.mkdir()
    save(prefix(), folder_path / "one.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        await folder.look()
        folder_path.rename(tmp_path / "away")
        for _ in range(2):
            await folder.look()
        assert names(session, catalogue) == ["own", "one"]
        (tmp_path / "away").rename(folder_path)
        await folder.look()
        assert names(session, catalogue) == ["own", "one"]

    looking(session, folder_path, use)
    assert caplog.text.count("cannot be read, and what it held stays") == 1


def test_a_fault_of_ours_ends_neither_the_start_nor_the_watch(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prefixkit.serving.http.prefix_folder.SECONDS", 0.01)
    stamps, failing = prefix_folder._stamps, [True]

    def fail_once(folder: Path) -> dict[str, tuple[int, int, int]]:
        if failing and failing.pop():
            raise RuntimeError("unforeseen")
        return stamps(folder)

    monkeypatch.setattr(prefix_folder, "_stamps", fail_once)
    save(prefix(), tmp_path / "new.safetensors")
    with serving(ScriptedEngine(session), prefixes=tmp_path) as client:
        eventually(lambda: client.ask("/v1/models/new")[0] == 200)
    assert caplog.text.count("could not be looked at") == 1


def test_a_fault_with_one_file_leaves_the_others(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(path: Path) -> Prefix:
        if path.name == "one.safetensors":
            raise RuntimeError("unforeseen")
        return load(path)

    monkeypatch.setattr(prefix_folder, "load", failing)
    for name in ("one", "two"):
        save(prefix(), tmp_path / f"{name}.safetensors")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        for _ in range(2):
            await folder.look()
        assert names(session, catalogue) == ["own", "two"]

    looking(session, tmp_path, use)
    assert caplog.text.count("one.safetensors is refused") == 1


def test_a_link_to_itself_is_refused_and_the_others_go_on(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    save(prefix(), tmp_path / "one.safetensors")
    (tmp_path / "below.safetensors").symlink_to(tmp_path / "one.safetensors" / "x")

    async def use(folder: PrefixFolder, catalogue: Catalogue) -> None:
        for _ in range(2):
            await folder.look()
        assert names(session, catalogue) == ["own", "one"]
        save(prefix(), tmp_path / "two.safetensors")
        await folder.look()
        assert names(session, catalogue) == ["own", "one", "two"]
        (tmp_path / "loop.safetensors").unlink()
        save(prefix(), tmp_path / "loop.safetensors")
        await folder.look()
        assert names(session, catalogue) == ["own", "one", "two", "loop"]

    looking(session, tmp_path, use)
    refused = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [one.partition(" ")[0] for one in refused] == ["below.safetensors", "loop.safetensors"]


def test_a_running_server_takes_changes_in(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixkit.serving.http.prefix_folder.SECONDS", 0.01)
    asked = {"model": "new", "prompt": "x", "max_tokens": 1}
    with serving(ScriptedEngine(session), prefixes=tmp_path) as client:
        assert client.refusal("/v1/completions", asked)[0] == 404
        made = save(prefix(length=7), tmp_path / "new.safetensors")
        eventually(lambda: client.ask("/v1/completions", asked)[0] == 200)
        card = client.ask("/v1/models/new")[1]["prefix"]
        assert card == {"method": "random", "length": 7, "content": made.manifest.content}
        assert client.metric("prefixkit_prefixes") == 2
        (tmp_path / "new.safetensors").unlink()
        eventually(lambda: client.ask("/v1/completions", asked)[0] == 404)
