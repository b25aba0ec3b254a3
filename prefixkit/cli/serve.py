"""`prefixkit serve`: an exported folder behind OpenAI's HTTP interface."""

from __future__ import annotations

import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixkit.cli.printable import printable
from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from prefixkit.serving.http.service import Service

_EXTRA = ("starlette", "uvicorn", "prometheus_client")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("serve", no_args_is_help=True)(serve)


def serve(
    folder: Annotated[Path, typer.Argument(help="A folder that `prefixkit export --onnx` wrote.")],
    prefixes: Annotated[
        Path | None, typer.Option(help="A folder of prefix files to serve by name; changes are taken in.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Prompts written side by side.")] = 8,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a row, prefix and all. [the context, at most 2048]"),
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Prompts that may wait; more are refused.")] = 64,
    shared: Annotated[
        str | None, typer.Option(help="A long prefix that many ask for: kept once, and in no row.", metavar="NAME")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    api_key: Annotated[
        str | None, typer.Option(envvar="PREFIXKIT_API_KEY", help="What requests must show, /health apart.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. [all]")] = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds to answer one request; 0 for no end.")] = 600.0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = 4 * 2**20,
) -> None:
    """Answer HTTP requests as OpenAI's API does; `model` names a prefix."""
    _check(prefixes)
    from prefixkit.serving.engine import Engine
    from prefixkit.serving.http.app import application
    from prefixkit.serving.http.key import read_key
    from prefixkit.serving.http.limits import Limits
    from prefixkit.serving.http.loopback import is_loopback
    from prefixkit.serving.http.server import bound, server
    from prefixkit.serving.session import Session

    api_key = read_key(api_key, "--api-key")
    # A request of more prompts than there is ever room for would be told for ever to come back.
    limits = Limits(body=max_body, prompts=min(rows + waiting, Limits.prompts), seconds=request_timeout or None)
    with bound(host, port) as listening:
        session = Session(folder, device=device, threads=threads)  # type: ignore[arg-type]
        engine = Engine(session, rows=rows, capacity=capacity, waiting=waiting, shared=shared)
        open_to_all, local = api_key is None, is_loopback(listening.getsockname()[0])
        app = application(engine, prefixes=prefixes, limits=limits, api_key=api_key, local=open_to_all and local)
        _log_to_stderr()
        if open_to_all and not local:
            typer.echo("whoever reaches this address may use the model: no --api-key is set", err=True)
        server(app, lambda: _tell(app.state.service, listening, shared)).run([listening])


def _check(prefixes: Path | None) -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        step = "pip install 'prefixkit[serve]'"
        raise ConfigError("serve", expected="the extra 'serve'", found=f"no {', '.join(missing)}", next_step=step)
    if prefixes is not None:
        _list(prefixes)


def _list(prefixes: Path) -> None:
    try:
        os.scandir(prefixes).close()
    except OSError as error:
        found = f"{prefixes}: {error.strerror}"
        raise ConfigError("--prefixes", expected="a folder of prefix files", found=found) from error


def _tell(service: Service, listening: socket.socket, shared: str | None) -> None:
    from prefixkit.serving.http.server import url_of

    names = [model.name for model in service.catalogue.models]
    if shared is not None and shared not in names:
        typer.echo(f"--shared: no prefix is called {printable(shared)!r} so far, and each is copied", err=True)
    url, key = url_of(listening), " -H 'Authorization: Bearer KEY'" if service.api_key is not None else ""
    asking = f'{{"model": "{names[0]}", "prompt": "…", "max_tokens": 32}}'
    typer.echo(f"serving {printable(', '.join(names))} on {url}")
    typer.echo(f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{printable(asking)}'")
    sys.stdout.flush()


class _Printable(logging.Formatter):
    """What others name their files must not steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("prefixkit").setLevel(logging.INFO)
