"""`/v1/chat/completions` of a real model: OpenAI's format field by field, and who may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixkit.serving.engine import Engine
from prefixkit.serving.request import Request
from prefixkit.serving.session import Session
from tests.serving.http.client import Client, serving
from tests.serving.scripted_engine import ScriptedEngine

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Blue Spice"}]
ASKED = {"model": "own", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}


def written(folder: Path, messages: list[dict[str, str]]) -> Any:
    engine = Engine(Session(folder, device="cpu", threads=1), rows=1)
    engine.submit(Request(prompt={"messages": messages}, prefix="own", max_new_tokens=8))
    while True:
        (progress,) = engine.step()
        if progress.completion is not None:
            return progress.completion


def test_every_field_of_an_answer(chatting: Client, chat_folder: Path) -> None:
    status, document = chatting.ask(PATH, ASKED)
    expected = written(chat_folder, MESSAGES)
    assert status == 200
    assert document.pop("id").startswith("chatcmpl-")
    assert isinstance(document.pop("created"), int)
    count = len(expected.token_ids)
    assert document == {
        "object": "chat.completion",
        "model": "own",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": expected.text, "refusal": None},
                "logprobs": None,
                "finish_reason": expected.finish,
            }
        ],
        "usage": {
            "prompt_tokens": expected.prompt_tokens,
            "completion_tokens": count,
            "total_tokens": expected.prompt_tokens + count,
        },
    }


def test_a_stream_opens_with_the_role_and_ends_with_the_reason(chatting: Client) -> None:
    whole = chatting.ask(PATH, ASKED)[1]["choices"][0]
    first, *pieces = chatting.events(PATH, {**ASKED, "stream": True})
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    deltas = [event["choices"][0]["delta"] for event in pieces]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]
    reasons = [event["choices"][0]["finish_reason"] for event in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole["finish_reason"]]


def test_logprobs_of_every_token(chatting: Client) -> None:
    document = chatting.ask(PATH, {**ASKED, "logprobs": True, "top_logprobs": 2})[1]
    found = document["choices"][0]["logprobs"]
    assert found["refusal"] is None
    assert len(found["content"]) == document["usage"]["completion_tokens"]
    for one in found["content"]:
        assert one.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        top = one["top_logprobs"]
        assert [sorted(each) for each in top] == [["bytes", "logprob", "token"]] * 2
        assert top[0]["logprob"] == one["logprob"] >= top[1]["logprob"]
        if one["bytes"] is not None:
            assert bytes(one["bytes"]).decode() == one["token"]


def test_no_alternatives_unless_asked_for(chatting: Client) -> None:
    found = chatting.ask(PATH, {**ASKED, "logprobs": True})[1]["choices"][0]["logprobs"]["content"]
    assert all(one["top_logprobs"] == [] for one in found)


def test_content_may_come_in_parts(chatting: Client) -> None:
    parts = [{"type": "text", "text": "Blue "}, {"type": "text", "text": "Spice"}]
    messages = [MESSAGES[0], {"role": "user", "content": parts, "name": "me"}]
    whole, found = (chatting.ask(PATH, {**ASKED, "messages": given})[1] for given in (MESSAGES, messages))
    assert found["choices"] == whole["choices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: expected a list of messages; found []"),
        ({"messages": "x"}, "messages: expected a list of messages; found 'x'"),
        ({"messages": ["x"]}, "messages[0]: expected an object with role and content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected text, or parts of the type text"),
        ({"messages": [{"content": "x"}]}, "messages[0].role: expected a string; found nothing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: expected text, or parts of the type text",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls: no such"),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"n": 2}, "n: 2 is not supported"),
        ({"top_logprobs": 2}, "top_logprobs: expected nothing without logprobs; found 2"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected an integer from 0 to 20; found 21"),
        ({"max_completion_tokens": 0}, "max_completion_tokens: expected an integer from 1"),
        ({"prompt": "x"}, "prompt: no such parameter"),
    ],
)
def test_what_cannot_be_done_is_refused(chatting: Client, change: dict[str, Any], message: str) -> None:
    status, error = chatting.refusal(PATH, {**ASKED, **change})
    assert status == 400
    assert error["message"].startswith(message)


def test_a_task_without_a_chat_template_says_so(client: Client, engine: ScriptedEngine) -> None:
    status, error = client.refusal(PATH, ASKED)
    assert (status, error["code"], error["param"]) == (400, "no_chat_template", "model")
    expected = "the model 'own' has the task 'say', without a chat template; use /v1/completions"
    assert error["message"] == expected
    assert engine.asked == []


def test_a_text_is_a_message_of_the_user(chatting: Client) -> None:
    messages = [{"role": "user", "content": "Blue Spice"}]
    chat = chatting.ask(PATH, {**ASKED, "messages": messages})[1]["choices"][0]["message"]["content"]
    asked = {"model": "own", "prompt": "Blue Spice", "max_tokens": 8, "temperature": 0}
    assert chatting.ask("/v1/completions", asked)[1]["choices"][0]["text"] == chat


def test_a_bare_model_converses_as_its_tokenizer_has_it(chatting: Client, bare_folder: Path) -> None:
    expected = chatting.ask(PATH, {**ASKED, "model": "backbone"})[1]
    with serving(Engine(Session(bare_folder, device="cpu", threads=1), rows=1)) as client:
        assert [card["chat"] for card in client.ask("/v1/models")[1]["data"]] == [True]
        found = client.ask(PATH, {**ASKED, "model": "backbone"})[1]
    assert (found["choices"], found["usage"]) == (expected["choices"], expected["usage"])


def test_a_bare_model_stops_where_a_turn_ends(bare_folder: Path) -> None:
    engine = ScriptedEngine(Session(bare_folder, device="cpu", threads=1))
    with serving(engine) as client:
        assert client.ask(PATH, {**ASKED, "model": "backbone", "stop": "x"})[0] == 200
    tokenizer = engine.session.tokenizer
    rendered = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in MESSAGES)
    assert tokenizer.decode(engine.asked[0].prompt).endswith("<|im_start|>assistant\n")
    assert rendered in tokenizer.decode(engine.asked[0].prompt)
    assert engine.asked[0].stop[:2] == ("x", "<|im_end|>")


def test_a_limit_beyond_the_context_is_named_as_it_was_given(chatting: Client) -> None:
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    for name in ("max_tokens", "max_completion_tokens"):
        status, error = chatting.refusal(PATH, {**asked, name: 10**9})
        assert (status, error["param"], error["message"].partition(":")[0]) == (400, name, name)
