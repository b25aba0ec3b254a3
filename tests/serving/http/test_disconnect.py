"""A client that hangs up frees its rows, whether its answer is streamed, whole, waiting or not begun."""

from __future__ import annotations

import json
import socket

import pytest

from tests.serving.http.client import Client, eventually
from tests.serving.scripted_engine import ENDLESS, ScriptedEngine

FOREVER = {"model": "own", "prompt": "Blue Spice", "max_tokens": ENDLESS}


@pytest.mark.parametrize("streamed", [True, False])
def test_hanging_up_frees_the_rows(client: Client, engine: ScriptedEngine, streamed: bool) -> None:
    path = "/v1/completions"
    request = json.dumps({**FOREVER, "prompt": ["a", "b", "c"], "stream": streamed}).encode()
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(request)}"]
        connection.sendall("\r\n".join([*head, "", ""]).encode() + request)
        eventually(lambda: (engine.running, engine.waiting) == (2, 1))
    eventually(lambda: engine.idle)
    assert sorted(engine.cancelled) == [0, 1, 2]
    eventually(lambda: client.service.active == 0)
    status = 200 if streamed else 499
    assert client.metric(f'prefixkit_requests_total{{route="{path}",status="{status}"}}') == 1
    assert client.metric("prefixkit_written_tokens_total") > 0


def test_an_answer_that_is_whole_is_not_cancelled(client: Client, engine: ScriptedEngine) -> None:
    assert client.ask("/v1/completions", {**FOREVER, "max_tokens": 3})[0] == 200
    assert client.events("/v1/completions", {**FOREVER, "max_tokens": 3, "stream": True})
    assert engine.cancelled == []


def test_a_client_that_does_not_read_holds_no_row(client: Client, engine: ScriptedEngine) -> None:
    engine.seconds = 0
    response = client.send("/v1/completions", {**FOREVER, "max_tokens": 5_000, "stream": True})
    eventually(lambda: engine.idle)
    with response:
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_what_is_written_is_counted_then_and_not_when_it_is_read(client: Client, engine: ScriptedEngine) -> None:
    engine.seconds, many = 0, 40_000
    body = json.dumps({**FOREVER, "max_tokens": many, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.socket() as stalled:
        # More than the buffers of both ends hold.
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", client.port))
        stalled.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: client.metric("prefixkit_written_tokens_total") == many)
        assert client.metric("prefixkit_time_per_token_seconds_count") == 1
        assert any(one.flow.write_paused for one in client.server.server_state.connections)
