"""Server-sent events: the pieces of an answer, its end and its errors."""

from __future__ import annotations

from tests.serving.http.client import Client
from tests.serving.scripted_engine import ENDLESS, ScriptedEngine

ASKED = {"model": "own", "prompt": ["a", "b"], "max_tokens": 3, "stream": True}


def test_the_chunks_of_every_prompt(client: Client) -> None:
    events = client.events("/v1/completions", ASKED)
    assert len({event["id"] for event in events}) == 1
    for event in events:
        assert event.keys() == {"id", "object", "created", "model", "choices"}
        assert (event["object"], event["model"], len(event["choices"])) == ("text_completion", "own", 1)
        assert event["choices"][0].keys() == {"index", "text", "logprobs", "finish_reason"}
    for index in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert [choice["text"] for choice in choices] == ["own-0", " own-1", " own-2"]
        assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]


def test_usage_is_told_at_the_end_where_it_is_asked_for(client: Client) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    *events, last = client.events("/v1/completions", {**ASKED, "stream_options": options})
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


def test_offsets_go_on_from_chunk_to_chunk(client: Client) -> None:
    events = client.events("/v1/completions", {**ASKED, "prompt": "a", "logprobs": 0})
    found = [event["choices"][0]["logprobs"] for event in events]
    assert [one["tokens"] for one in found] == [["own-0"], [" own-1"], [" own-2"]]
    assert [one["text_offset"] for one in found] == [[0], [5], [11]]


def test_pieces_come_while_the_rest_is_being_written(client: Client) -> None:
    response = client.send("/v1/completions", {**ASKED, "max_tokens": ENDLESS})
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.readline().startswith(b"data: {")
    assert client.service.worker.running == 2
    response.close()


def test_an_engine_that_fails_on_the_way_is_told_in_the_stream(client: Client, engine: ScriptedEngine) -> None:
    response = client.send("/v1/completions", {**ASKED, "max_tokens": ENDLESS})
    assert response.status == 200
    response.readline()
    engine.failures = 1
    with response:
        *_, last, end = response.read().decode().split("\n\n")
    assert end == ""
    assert '"code": "engine_fault"' in last
