"""Who is refused before all of the request has been read is told so, and not cut off."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from prefixkit.serving.http import exchange
from tests.serving.http.client import Client, eventually, serving
from tests.serving.scripted_engine import ScriptedEngine

LARGE = 16 * 2**20
"""Bytes: more than the buffers of a connection hold, and than a body may have."""


def status_of(client: Client, path: str, data: object, **headers: str) -> int:
    """As urllib has it, which sends everything before it reads anything, and closes."""
    sent = {"Content-Type": "application/json", **headers}
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"http://127.0.0.1:{client.port}{path}", data, sent), timeout=30)
    with refused.value as answer:
        assert answer.read().startswith(b'{"error": {"message": "')
        return answer.code


def pieces() -> Iterator[bytes]:
    for _ in range(16):
        yield b" " * (LARGE // 16)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_body_is_told_to_be_large(client: Client, chunked: bool) -> None:
    assert status_of(client, "/v1/completions", pieces() if chunked else b" " * LARGE) == 413


def test_other_refusals_are_told_too(engine: ScriptedEngine) -> None:
    with serving(engine, api_key="sesame") as client:
        assert status_of(client, "/v1/completions", b" " * LARGE) == 401
        assert status_of(client, "/v1/nothing", b" " * LARGE, Authorization="Bearer sesame") == 404


@pytest.mark.parametrize(("seconds", "most"), [(0.1, 1000), (1000, 1)])
def test_what_is_left_is_not_read_for_ever(
    client: Client, monkeypatch: pytest.MonkeyPatch, seconds: float, most: int
) -> None:
    monkeypatch.setattr(exchange, "SECONDS", seconds)
    monkeypatch.setattr(exchange, "_MOST", most)
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n{}"
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as made:
        made.sendall(head)
        received = b"".join(iter(lambda: made.recv(1000), b""))
        assert received.startswith(b"HTTP/1.1 404 ")
        eventually(lambda: not client.server.server_state.connections)


def test_who_was_told_to_go_on_is_told_of_the_end(client: Client) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as made:
        made.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert made.recv(1000).startswith(b"HTTP/1.1 100 ")
        made.sendall(f"{LARGE:x}\r\n".encode() + b" " * LARGE + b"\r\n0\r\n\r\n")
        received = b"".join(iter(lambda: made.recv(1000), b""))
    assert received.startswith(b"HTTP/1.1 413 ")
    assert received.endswith(b"}}")


def test_who_expects_to_be_told_to_go_on_is_told_otherwise(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "SECONDS", 1000)
    head = b"POST /nothing HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as made:
        made.sendall(head)
        assert made.recv(1000).startswith(b"HTTP/1.1 404 ")
        eventually(lambda: not client.server.server_state.tasks)
