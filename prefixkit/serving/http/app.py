"""The ASGI application: routes, errors, and what lives as long as the server does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prefixkit.serving.engine import Engine
from prefixkit.serving.http.catalogue import Catalogue
from prefixkit.serving.http.chat import chat
from prefixkit.serving.http.completions import complete
from prefixkit.serving.http.errors import HANDLED
from prefixkit.serving.http.gate import Gate
from prefixkit.serving.http.key import read_key
from prefixkit.serving.http.limits import Limits
from prefixkit.serving.http.prefix_folder import PrefixFolder
from prefixkit.serving.http.service import Service, service_of
from prefixkit.serving.worker import Worker


def application(
    engine: Engine,
    *,
    prefixes: Path | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
    local: bool = False,
) -> Starlette:
    """A server of `engine`, which it owns from its start on.

    Args:
        prefixes: a folder whose prefix files are served too, and looked at again and again.
        local: answer only who calls this machine by a name of its own. A web page can give its address another name,
            and would be let in by the browser (DNS rebinding).

    Raises:
        ConfigError: a key that is empty or that no header can carry.
    """
    service = Service(
        session=engine.session,
        capacity=engine.capacity,
        worker=Worker(engine),
        catalogue=Catalogue(engine.session.report, engine.session.tokenizer),
        limits=limits or Limits(),
        api_key=read_key(api_key, "api_key"),
        local=local,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        try:
            if prefixes is None:
                yield
            else:
                async with PrefixFolder(prefixes, service.worker, service.catalogue).watched():
                    yield
        finally:
            await service.worker.close()

    routes = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/health", _health),
        Route("/metrics", _metrics),
    ]
    gate = Middleware(Gate, service=service)
    app = Starlette(routes=routes, middleware=[gate], exception_handlers=HANDLED, lifespan=lifespan)
    app.state.service = service
    return app


async def _models(request: Request) -> Response:
    models = service_of(request).catalogue.models
    return JSONResponse({"object": "list", "data": [model.card for model in models]})


async def _model(request: Request) -> Response:
    return JSONResponse(service_of(request).catalogue.find(request.path_params["name"]).card)


async def _health(request: Request) -> Response:
    status, reason = service_of(request).health
    return JSONResponse({"status": status, "reason": reason}, 200 if status == "ok" else 503)


async def _metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
