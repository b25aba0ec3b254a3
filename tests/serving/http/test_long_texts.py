"""Long prompts: refused before they are tokenised where they cannot fit, and nobody waits for the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from prefixkit.serving.engine import Engine
from prefixkit.serving.generation import Prompt
from prefixkit.serving.http.long_texts import LONG
from prefixkit.serving.session import Session
from prefixkit.task import ModelTokenizer
from tests.serving.http.client import Client, serving
from tests.serving.scripted_engine import ScriptedEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = {"model": "own", "prompt": "Blue Spice", "max_tokens": 2}
HOPELESS = "a" * 100_000
SAID = [{"role": "user", "content": HOPELESS}]


@pytest.fixture
def short_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: ModelTokenizer, text: str) -> list[int]:
        assert len(text) < LONG
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    monkeypatch.setattr(ModelTokenizer, "encode_text", encode)
    monkeypatch.setattr(ModelTokenizer, "encode_rendered", encode)


@pytest.mark.usefixtures("short_texts_only")
def test_what_cannot_fit_is_refused_before_it_is_tokenised(served: Client) -> None:
    for prompt in (HOPELESS, ["x", HOPELESS]):
        status, error = served.refusal(COMPLETIONS, {**ASKED, "prompt": prompt})
        assert (status, error["param"]) == (400, "prompt")
        assert error["message"].startswith("prompt: expected at most ")
        assert error["message"].endswith(" tokens; found a text of 100000 characters, which has more; shorten it")


@pytest.mark.usefixtures("short_texts_only")
def test_so_is_a_conversation(chatting: Client, bare_folder: Path) -> None:
    status, error = chatting.refusal(CHAT, {"model": "own", "messages": SAID})
    assert (status, error["message"].partition(":")[0], error["param"]) == (400, "messages", "messages")
    assert "which has more; shorten it" in error["message"]
    with serving(Engine(Session(bare_folder, device="cpu", threads=1), rows=1)) as client:
        name = client.ask("/v1/models")[1]["data"][0]["id"]
        status, error = client.refusal(CHAT, {"model": name, "messages": SAID})
    assert (status, error["message"].partition(":")[0], error["param"]) == (400, "messages", "messages")
    assert "which has more; shorten it" in error["message"]


def test_nobody_waits_while_a_long_text_is_tokenised(
    session: Session, engine: ScriptedEngine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, prompt = Event(), Event(), session.prompt("x", "own", "prompt", 2)

    def slow(*_: Any, **__: Any) -> Prompt:
        begun.set()
        assert go_on.wait(60)
        return prompt

    monkeypatch.setattr(session, "prompt", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.ask, COMPLETIONS, {**ASKED, "prompt": ["x " * (LONG // 4)] * 2})
        try:
            assert begun.wait(30)
            assert client.ask("/health")[0] == 200
            assert client.ask(COMPLETIONS, ASKED)[0] == 200
            assert [request.prompt for request in engine.asked] == ["Blue Spice"]
        finally:
            go_on.set()
        assert waiting.result(30)[0] == 200
    assert [request.prompt for request in engine.asked[1:]] == [prompt, prompt]


def test_a_long_text_is_answered_as_in_a_short_request(served: Client) -> None:
    texts = ["Blue Spice", "The Eagle"]
    alone = [served.ask(COMPLETIONS, {**ASKED, "prompt": text, "temperature": 0})[1]["choices"][0] for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefixkit.serving.http.long_texts.LONG", 1)
        together = served.ask(COMPLETIONS, {**ASKED, "prompt": texts, "temperature": 0})[1]["choices"]
    assert [one["text"] for one in together] == [one["text"] for one in alone]
