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


@contextmanager
def connected(client: Client) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as made:
        yield made


def received(made: socket.socket) -> bytes:
    """All there is until the server closes the connection."""
    return b"".join(iter(lambda: made.recv(1000), b""))


@pytest.mark.parametrize("sent", [b"", HALF])
def test_a_head_must_arrive(client: Client, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "SECONDS", 0.1)
    with connected(client) as made:
        made.sendall(sent)
        assert received(made) == b""


def test_a_second_head_must_arrive(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(client) as made:
        eventually(lambda: bool(client.server.server_state.connections))
        monkeypatch.setattr(connection, "SECONDS", 0.1)
        made.sendall(WHOLE + HALF)
        answer = received(made)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1 ") == 1


def test_an_answer_takes_its_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = json.dumps({"model": "own", "prompt": "x", "max_tokens": 200}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}"
    first, second = f"{head}\r\n\r\n".encode() + asked, f"{head}\r\nConnection: close\r\n\r\n".encode() + asked
    with connected(client) as made:
        eventually(lambda: bool(client.server.server_state.connections))
        monkeypatch.setattr(connection, "SECONDS", 0.1)
        # The second is there when the deadline for it begins.
        made.sendall(first + second)
        answers = received(made)
    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert answers.count(b"own-199") == 2


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
