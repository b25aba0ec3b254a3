"""The end of a server: what runs may finish, what is new is refused, and nothing waits longer than the grace."""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefixkit.errors import ConfigError
from prefixkit.serving.http.limits import Limits
from prefixkit.serving.http.server import bound, url_of
from tests.serving.http.client import Client, eventually, serving
from tests.serving.scripted_engine import ENDLESS, ScriptedEngine

PATH = "/v1/completions"
ASKED = {"model": "own", "prompt": "Blue Spice", "max_tokens": 300, "stream": True}


def tell(client: Client) -> None:
    client.server.handle_exit(signal.SIGTERM, None)


def is_closed(client: Client) -> bool:
    try:
        socket.create_connection(("127.0.0.1", client.port), timeout=5).close()
    except OSError:
        return True
    return False


def test_what_runs_finishes_and_what_is_new_is_refused(client: Client) -> None:
    running = client.send(PATH, ASKED)
    running.readline()
    tell(client)
    assert client.ask("/health") == (503, {"status": "draining", "reason": "the server is shutting down"})
    status, error = client.refusal(PATH, ASKED)
    assert (status, error["type"]) == (503, "server_error")
    with client.send(PATH, ASKED) as response:
        assert (response.headers["Retry-After"], response.headers["Connection"]) == ("1", "close")
    with running:
        assert running.read().endswith(b"data: [DONE]\n\n")
    eventually(lambda: is_closed(client))


def test_a_server_without_work_ends_at_once(client: Client) -> None:
    tell(client)
    eventually(lambda: is_closed(client))


def test_half_a_request_is_not_waited_for(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prefixkit.serving.http.body.SECONDS", 1000)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with serving(engine, limits=Limits(grace=1000)) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as half:
            half.sendall(head.encode() + b"{")
            eventually(lambda: bool(client.server.server_state.tasks))
            tell(client)
            assert half.recv(100) == b""
        eventually(lambda: is_closed(client))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("signals", [1, 2])
def test_nothing_outlasts_the_grace_or_a_second_signal(
    engine: ScriptedEngine, signals: int, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(engine, limits=Limits(grace=0.2 if signals == 1 else 1000)) as client:
        running = client.send(PATH, {**ASKED, "max_tokens": ENDLESS})
        running.readline()
        for _ in range(signals):
            tell(client)
        eventually(lambda: is_closed(client))
        # Not ended as if it were whole.
        with running:
            last = running.read().split(b"\n\n")[-2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == "the server is shutting down"
    assert "prefixkit-engine" not in [thread.name for thread in threading.enumerate()]
    assert engine.cancelled == [0]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_who_waits_for_a_whole_answer_is_told_that_there_is_none(engine: ScriptedEngine) -> None:
    with serving(engine, limits=Limits(grace=0.2)) as client, ThreadPoolExecutor() as aside:
        asking = aside.submit(client.refusal, PATH, {**ASKED, "max_tokens": ENDLESS, "stream": False})
        eventually(lambda: engine.running == 1)
        tell(client)
        status, error = asking.result(30)
    assert (status, error["message"]) == (503, "the server is shutting down")


def test_who_reads_nothing_is_not_waited_for(engine: ScriptedEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.seconds = 0
    body = json.dumps({**ASKED, "max_tokens": ENDLESS}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as stalled, serving(engine, limits=Limits(grace=0.2)) as client:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", client.port))
        stalled.sendall(head.encode() + body)
        eventually(lambda: any(one.flow.write_paused for one in client.server.server_state.connections))
        tell(client)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_port_that_is_taken_is_told() -> None:
    with bound("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="expected an address to listen at"):
        bound("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_addresses_are_those_that_clients_write(host: str, shown: str) -> None:
    with bound(host, 0) as listening:
        assert url_of(listening) == f"{shown}{listening.getsockname()[1]}"


def test_a_host_that_is_none_is_told() -> None:
    with pytest.raises(ConfigError, match="--host nowhere"):
        bound("nowhere.invalid", 0)
