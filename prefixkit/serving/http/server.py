"""The process: a socket, uvicorn, and an end that lets running requests finish."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from prefixkit.errors import ConfigError
from prefixkit.serving.http import connection
from prefixkit.serving.http.connection import Connection
from prefixkit.serving.http.service import Service

_QUEUE = 2048
"""Connections that may wait to be accepted."""

_AT_ONCE = 8
"""Those that are accepted before the first of them is looked at, and perhaps refused. asyncio takes one number for this
and for the queue, and with the queue's a crowd would take every file descriptor."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at `host`, on a free port where `port` is 0. Raises ConfigError."""
    where = f"--host {host} --port {port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise ConfigError(where, expected="an address to listen at", found=str(error)) from error


def url_of(listening: socket.socket) -> str:
    """The address of a socket as a client writes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Starlette, started: Callable[[], None]) -> DrainingServer:
    """A server of `app`, to `run` with a list of sockets; it calls `started` when it answers requests."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_AT_ONCE,
        timeout_keep_alive=math.ceil(connection.SECONDS),
        # The grace is over by then: what still runs is cancelled.
        timeout_graceful_shutdown=1,
    )
    return DrainingServer(config, app.state.service, started)


class DrainingServer(uvicorn.Server):
    """Serves until SIGINT or SIGTERM; then refuses what is new, and ends when what runs has finished, or the grace has.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._tell = service, started
        self._end = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_QUEUE)
        if self.started:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in self.servers:
            listening.close()
        # Whoever still waits is told why there is no more, as uvicorn would only hang up.
        await self._service.worker.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = True
        else:
            self._end = time.monotonic() + self._service.limits.grace
            self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        drained = self._service.draining and (self._service.active == 0 or time.monotonic() >= self._end)
        return await super().on_tick(counter) or drained
