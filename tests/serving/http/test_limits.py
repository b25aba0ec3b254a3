"""Who may ask, how much, how long, and what happens where there is no room."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator

import pytest

from prefixkit.errors import ConfigError
from prefixkit.serving.http.limits import Limits
from prefixkit.serving.request import TokenScore
from prefixkit.serving.worker import FAILURES
from tests.serving.http.client import Client, eventually, serving
from tests.serving.scripted_engine import ENDLESS, ScriptedEngine

COMPLETIONS = "/v1/completions"
ASKED = {"model": "own", "prompt": "Blue Spice", "max_tokens": 2}
FOREVER = {**ASKED, "max_tokens": ENDLESS}


@pytest.fixture
def small(engine: ScriptedEngine) -> Iterator[Client]:
    with serving(engine, limits=Limits(body=200, seconds=0.3)) as made:
        yield made


@pytest.fixture
def locked(engine: ScriptedEngine) -> Iterator[Client]:
    with serving(engine, api_key="sesame") as made:
        yield made


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/metrics", "/nothing"])
@pytest.mark.parametrize("shown", [None, "Bearer", "Bearer sesam", "Bearer sesamee", "Basic sesame", "sesame"])
def test_without_the_key_nothing_is_told(locked: Client, path: str, shown: str | None) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    with locked.send(path, ASKED if path == COMPLETIONS else None, headers=headers) as response:
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    status, error = locked.refusal("/v1/models", headers=headers)
    assert (status, error["code"]) == (401, "invalid_api_key")


def test_with_the_key_all_is_open_and_health_without(locked: Client) -> None:
    assert locked.ask(COMPLETIONS, ASKED, headers={"Authorization": "Bearer sesame"})[0] == 200
    assert locked.ask("/health") == (200, {"status": "ok", "reason": None})


def test_other_names_of_this_machine_are_refused_where_nobody_shows_a_key(engine: ScriptedEngine) -> None:
    with serving(engine, local=True) as client:
        for host in ("localhost:1", "127.0.0.1", "127.0.0.2:8000", "[::1]:8000", "LocalHost"):
            assert client.ask("/v1/models", headers={"Host": host})[0] == 200
        for host in ("evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", "[::2]:1", "localhost.evil.example", ""):
            assert client.refusal("/v1/models", headers={"Host": host})[0] == 403
        assert client.refusal(COMPLETIONS, ASKED, headers={"Host": "evil.example:8000"})[0] == 403
    assert engine.asked == []


def test_large_bodies_are_refused_whether_or_not_they_say_so(small: Client) -> None:
    large = {**ASKED, "prompt": "x" * 200}
    assert small.refusal(COMPLETIONS, large)[0] == 413
    connection = small.connect()
    connection.putrequest("POST", COMPLETIONS)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    connection.send(b"c9\r\n" + b" " * 201 + b"\r\n")
    with connection.getresponse() as response:
        assert response.status == 413
    connection.close()
    assert small.ask(COMPLETIONS, ASKED)[0] == 200


def test_slow_bodies_are_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixkit.serving.http.body.SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as slow:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        slow.sendall(head.encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_an_answer_that_takes_too_long_is_given_up(small: Client, engine: ScriptedEngine) -> None:
    status, error = small.refusal(COMPLETIONS, FOREVER)
    assert (status, error["code"], error["type"]) == (504, "timeout", "server_error")
    with small.send(COMPLETIONS, {**FOREVER, "stream": True}) as response:
        *_, last, end = response.read().decode().split("\n\n")
    assert end == ""
    assert '"code": "timeout"' in last
    eventually(lambda: engine.cancelled == [0, 1])


def test_where_there_is_no_room_clients_are_told_to_come_back(client: Client, engine: ScriptedEngine) -> None:
    streams = [client.send(COMPLETIONS, {**FOREVER, "stream": True}) for _ in range(4)]
    response = client.send(COMPLETIONS, ASKED)
    with response:
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
    status, error = client.refusal(COMPLETIONS, ASKED)
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    for stream in streams:
        stream.close()
    client.close()
    eventually(lambda: client.service.worker.running == 0)
    assert client.ask(COMPLETIONS, ASKED)[0] == 200


def test_there_is_room_for_what_is_written_and_what_waits(served: Client) -> None:
    # Three rows, and eight that wait.
    assert served.ask(COMPLETIONS, {**ASKED, "prompt": ["x"] * 11})[0] == 200
    assert served.refusal(COMPLETIONS, {**ASKED, "prompt": ["x"] * 12})[0] == 429


def test_a_failing_engine_is_told_and_survived(client: Client, engine: ScriptedEngine) -> None:
    engine.failures = 1
    status, error = client.refusal(COMPLETIONS, ASKED)
    assert (status, error["code"]) == (503, "engine_fault")
    assert "device" not in error["message"]
    assert client.ask("/health")[0] == 200
    assert client.ask(COMPLETIONS, ASKED)[0] == 200


def test_a_broken_engine_is_unhealthy(client: Client, engine: ScriptedEngine) -> None:
    engine.failures = FAILURES
    for _ in range(FAILURES):
        assert client.refusal(COMPLETIONS, ASKED)[0] == 503
    status, health = client.ask("/health")
    assert (status, health["status"]) == (503, "failed")
    assert health["reason"] == "it fails at every step: RuntimeError: the device is gone"
    assert client.refusal(COMPLETIONS, ASKED)[0] == 503


def test_a_fault_of_ours_is_told_without_details(
    client: Client, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: object) -> int:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "submit", fail)
    status, error = client.refusal(COMPLETIONS, ASKED)
    assert (status, error["message"], error["type"]) == (500, "internal error", "server_error")
    eventually(lambda: client.metric('prefixkit_requests_total{route="/v1/completions",status="500"}') == 1)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_what_is_no_number_is_told_and_not_sent(
    client: Client, monkeypatch: pytest.MonkeyPatch, logprob: float
) -> None:
    monkeypatch.setattr("tests.serving.scripted_engine.TokenScore", lambda *_: TokenScore(0, "x", logprob))
    status, error = client.refusal(COMPLETIONS, {**ASKED, "logprobs": 0})
    assert (status, error["code"], error["param"]) == (500, "not_finite", "logprobs")
    with client.send(COMPLETIONS, {**ASKED, "logprobs": 0, "stream": True}) as response:
        (event, _) = response.read().decode().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "not_finite"
    assert client.ask(COMPLETIONS, ASKED)[0] == 200


@pytest.mark.parametrize("wrong", [{"body": 0}, {"seconds": 0}, {"seconds": -1.0}])
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Limits(**wrong)  # type: ignore[arg-type]
