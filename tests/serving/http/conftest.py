"""Servers of real folders: with the real engine, or with a scripted one where what stands before it is tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.export.onnx import export_onnx
from prefixkit.serving.engine import Engine
from prefixkit.serving.session import Session
from prefixkit.task import load_task, load_tokenizer
from tests.architectures import tiny
from tests.exported import exported, random_prefix
from tests.serving.http.client import Client, serving
from tests.serving.scripted_engine import ScriptedEngine
from tests.small_tokenizer import CHAT_TEMPLATE, END, write_folder


@pytest.fixture(scope="session")
def session() -> Session:
    return Session(exported("gpt2", target="cuda").folder, device="cpu", threads=1)


@pytest.fixture(scope="session")
def chat_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "backbone"
    tiny("gpt2").save_pretrained(folder)
    special = {"bos_token": END, "eos_token": END, "chat_template": CHAT_TEMPLATE}
    return write_folder(folder, tokenizer_config=special)


@pytest.fixture(scope="session")
def chat_folder(chat_backbone: Path) -> Path:
    """An exported folder whose prefix was trained on conversations."""
    task, loaded = load_task("chat", load_tokenizer(chat_backbone), max_length=128), load_backbone(chat_backbone)
    prefix = random_prefix(loaded.identity, task=task)
    return export_onnx(prefix, loaded, chat_backbone.parent / "served", target="cuda").folder


@pytest.fixture(scope="session")
def bare_folder(chat_backbone: Path) -> Path:
    """The same model, exported without a prefix."""
    return export_onnx(None, chat_backbone, chat_backbone.parent / "bare", target="cuda").folder


@pytest.fixture
def engine(session: Session) -> ScriptedEngine:
    return ScriptedEngine(session)


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[Client]:
    with serving(engine) as made:
        yield made


@pytest.fixture(scope="module")
def served(session: Session) -> Iterator[Client]:
    """The real engine behind a server."""
    with serving(Engine(session, rows=3, waiting=8)) as made:
        yield made


@pytest.fixture(scope="module")
def chatting(chat_folder: Path) -> Iterator[Client]:
    """The real engine, with a prefix that converses."""
    with serving(Engine(Session(chat_folder, device="cpu", threads=1), rows=2)) as made:
        yield made
