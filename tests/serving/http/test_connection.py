"""Connections that nothing comes from are closed, those that an answer goes to are not."""

from __future__ import annotations

import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prefixkit.serving.http import connection
from tests.serving.http.client import Client, eventually

HALF = b"GET /health HTTP/1.1\r\nHost: x\r\nHalf"
WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS", 0.1)


@contextmanager
def connected(client: Client) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as made:
        yield made


def received(made: socket.socket) -> bytes:
    """All there is until the server closes the connection."""
    return b"".join(iter(lambda: made.recv(1000), b""))


@pytest.mark.parametrize("sent", [b"", HALF])
def test_a_head_must_arrive(impatient: None, client: Client, sent: bytes) -> None:
    with connected(client) as made:
        made.sendall(sent)
        assert received(made) == b""


def test_a_second_head_must_arrive(impatient: None, client: Client) -> None:
    with connected(client) as made:
        made.sendall(WHOLE)
        answer = made.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200 ")
        made.sendall(HALF)
        assert received(made) == b""


def test_an_answer_takes_its_time(impatient: None, client: Client) -> None:
    # Both the first request of a connection and one behind another.
    asked = {"model": "own", "prompt": "x", "max_tokens": 200}
    kept = client.connect()
    for _ in range(2):
        with client.send("/v1/completions", asked, connection=kept) as response:
            assert len(json.loads(response.read())["choices"][0]["text"].split()) == 200


def test_there_are_descriptors_left(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (4, 4))
    with caplog.at_level(logging.WARNING), connected(client) as first, connected(client):
        with connected(client) as third:
            assert received(third) == b""
        first.sendall(WHOLE)
        assert first.recv(100).startswith(b"HTTP/1.1 200 ")
    assert "a connection is refused: 2 are open" in caplog.text
    eventually(lambda: not client.server.server_state.connections)
    assert client.ask("/health")[0] == 200
