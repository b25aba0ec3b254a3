"""What the routes share: the worker, the models, the metrics, the limits, and whether the server is open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request

from prefixkit.serving.http.catalogue import Catalogue
from prefixkit.serving.http.limits import Limits
from prefixkit.serving.http.metrics import Metrics
from prefixkit.serving.session import Session
from prefixkit.serving.worker import Worker


@dataclass(kw_only=True)
class Service:
    """One server.

    Attributes:
        session: of the worker's engine, for what never changes and for prompts of long texts; the rest belongs to the
            worker's thread.
        capacity: slots of a row of the engine.
        api_key: what requests must show; None where they need not.
        local: whether requests must call this machine by a name of its own.
        draining: whether it finishes what it has and takes nothing new.
        active: requests that have been read, and have no whole response yet.
    """

    session: Session
    capacity: int
    worker: Worker
    catalogue: Catalogue
    limits: Limits
    api_key: str | None = None
    local: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    active: int = 0

    def __post_init__(self) -> None:
        watch = self.metrics.watch
        watch("running_requests", "Prompts being written.", lambda: self.worker.running)
        watch("waiting_requests", "Prompts that wait for a row.", lambda: self.worker.waiting)
        watch("prefixes", "Prefixes served.", lambda: sum(one.manifest is not None for one in self.catalogue.models))

    @property
    def health(self) -> tuple[Literal["ok", "draining", "failed"], str | None]:
        """How it is, and why it is no better."""
        if self.worker.fault is not None:
            return "failed", self.worker.fault
        return ("draining", "the server is shutting down") if self.draining else ("ok", None)


def service_of(request: Request) -> Service:
    """The server that a request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
