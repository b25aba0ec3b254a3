"""Backbones and data small enough for every test, made on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = ["the", "blue", "spice", "river", "eagle", "mill", "pub", "cheap", "near", "city", "coffee", "shop", "food"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep digests of test files out of the user's cache."""
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread: the models are tiny, and results must not depend on the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """Nothing compiled by another test, nothing left to the next."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@contextmanager
def _without_progress() -> Iterator[None]:
    """A test that looks at what is printed may be the first to want a model."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`backbone_folder("llama")`: a folder with a tiny random model of that family and a tokenizer."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, seed: int = 0) -> Path:
        if (family, seed) not in made:
            from tests.architectures import tiny
            from tests.small_tokenizer import END, write_folder

            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            with _without_progress():
                tiny(family, seed).save_pretrained(folder)
            write_folder(folder, tokenizer_config={"bos_token": END, "eos_token": END})
            made[family, seed] = folder
        return made[family, seed]

    return make


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small examples in JSONL."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = []
    for index in range(40):
        name, place = WORDS[index % len(WORDS)], WORDS[(index * 7 + 3) % len(WORDS)]
        lines.append(json.dumps({"input": f"name : {name} | area : {place}", "target": f"{name} is near {place} ."}))
    path.write_text("\n".join(lines) + "\n")
    return path
