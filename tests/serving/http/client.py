"""A server in a thread, on a free port, and a client that speaks HTTP and nothing more."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from threading import Event, Thread
from typing import Any

from prefixkit.serving.http.app import application
from prefixkit.serving.http.server import DrainingServer, bound, server
from prefixkit.serving.http.service import Service


@dataclass
class Client:
    """Asks a server in this process."""

    port: int
    server: DrainingServer
    service: Service
    headers: Mapping[str, str] = field(default_factory=dict)
    opened: list[HTTPConnection] = field(default_factory=list)

    def connect(self) -> HTTPConnection:
        """A connection that is closed with the server, or before."""
        self.opened.append(HTTPConnection("127.0.0.1", self.port, timeout=30))
        return self.opened[-1]

    def close(self) -> None:
        """Close every connection, whatever is still to come."""
        while self.opened:
            self.opened.pop().close()

    def send(
        self, path: str, body: Any = None, *, headers: Mapping[str, str] = {}, connection: HTTPConnection | None = None
    ) -> HTTPResponse:
        """Send a request, with a body as JSON or as the bytes that it is, and return the response unread."""
        connection = connection or self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **self.headers, **headers}
        connection.request("GET" if body is None else "POST", path, body=data, headers=sent)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Status and JSON of the response."""
        response = self.send(path, body, **options)
        with response:
            return response.status, json.loads(response.read())

    def refusal(self, path: str, body: Any = None, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a response that is one."""
        status, document = self.ask(path, body, **options)
        assert document.keys() == {"error"}
        assert document["error"].keys() == {"message", "type", "param", "code"}
        return status, document["error"]

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, which must end with `[DONE]`; that one is left out."""
        response = self.send(path, body)
        with response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            *blocks, end = response.read().decode().split("\n\n")
        assert end == ""
        data = [block.removeprefix("data: ") for block in blocks]
        assert data.pop() == "[DONE]"
        return [json.loads(one) for one in data]

    def metric(self, name: str) -> float:
        """The value of a metric, labels and all."""
        with self.send("/metrics") as response:
            lines = response.read().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


@contextmanager
def serving(engine: Any, *, headers: Mapping[str, str] = {}, **options: Any) -> Iterator[Client]:
    """A server of `engine`, ready to answer; `options` are those of `application`."""
    app, ready, listening = application(engine, **options), Event(), bound("127.0.0.1", 0)
    made = server(app, ready.set)
    thread = Thread(target=made.run, args=([listening],))
    thread.start()
    try:
        assert ready.wait(30)
        client = Client(listening.getsockname()[1], made, app.state.service, headers)
        with closing(client):
            yield client
    finally:
        made.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()


def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `holds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
