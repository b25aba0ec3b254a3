"""A Ray Serve application: the server of `prefixkit serve` as replicas on one machine or many.

    serve run prefixkit.bridges.ray_serve:app folder=/models/served prefixes=/models/tasks num_replicas=2 num_gpus=1

Every replica is one process with one engine; Ray starts them, sends each request to one, and replaces one whose engine
has failed. Folder and prefixes are paths that every machine can read. Needs the extra `ray`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from ray import serve
from starlette.applications import Starlette

from prefixkit.errors import ConfigError
from prefixkit.serving.engine import Engine
from prefixkit.serving.http.app import application
from prefixkit.serving.http.key import read_key
from prefixkit.serving.http.limits import Limits
from prefixkit.serving.session import Session
from prefixkit.spelling import did_you_mean

KEY = "PREFIXKIT_API_KEY"
_log = logging.getLogger(__name__)


def app(args: Mapping[str, Any]) -> Any:
    """The application for `serve run` and `serve deploy`: `args` are the arguments of `replicated`, or texts of them.

    Raises:
        ConfigError: an argument that is unknown, missing or no number where it must be one.
    """
    known = signature(replicated).parameters
    for name in args:
        if name not in known:
            step = did_you_mean(name, known)
            raise ConfigError("app", expected="a known argument", found=repr(name), next_step=step)
    if "folder" not in args:
        raise ConfigError("app", expected="folder=…, as `prefixkit export --onnx` wrote it", found="none")
    return replicated(**{name: _read(name, value) for name, value in args.items()})


def replicated(
    folder: str | Path,
    *,
    prefixes: str | Path | None = None,
    rows: int = 8,
    capacity: int | None = None,
    waiting: int = 64,
    device: str | None = None,
    threads: int | None = None,
    api_key: str | None = None,
    num_replicas: int | str | None = None,
    num_gpus: float = 0,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The application for `serve.run`.

    Args:
        folder, prefixes, rows, capacity, waiting, threads: of each replica; see `prefixkit serve`.
        device: by default `cuda` for replicas that have a GPU, else `auto`.
        api_key: by default what the environment calls `PREFIXKIT_API_KEY`, here or where the replica runs; there Ray
            does not show it to those who read its dashboard.
        num_replicas: how many, or `auto`.
        num_gpus: of each replica. Without any it sees none, and runs on the CPU.
        options: whatever else Ray Serve knows of a deployment, such as `autoscaling_config`; it wins.

    Raises:
        ConfigError: a key that is empty or that no header can carry. What is wrong with folders is told by the
            replicas, which have them.
    """
    # Replicas may run where this environment is not.
    api_key = read_key(api_key, "app api_key") or os.environ.get(KEY)
    device = device or ("cuda" if num_gpus else "auto")

    def build() -> Starlette:
        session = Session(folder, device=device, threads=threads)  # type: ignore[arg-type]
        engine = Engine(session, rows=rows, capacity=capacity, waiting=waiting)
        limits = Limits(prompts=min(rows + waiting, Limits.prompts))
        return application(engine, prefixes=_folder(prefixes), limits=limits, api_key=_key(api_key))

    chosen = _deployment(rows, waiting, num_gpus, num_replicas, options or {})
    return serve.deployment(serve.ingress(build)(Replica), name="prefixkit", **chosen).bind()


class Replica:
    """What Ray asks of a replica beside requests."""

    app: Starlette

    def check_health(self) -> None:
        """Raise RuntimeError where nothing can be written any more, whereupon Ray replaces the replica."""
        status, reason = self.app.state.service.health
        if status == "failed":
            raise RuntimeError(reason)


def _folder(prefixes: str | Path | None) -> Path | None:
    if prefixes is not None and not Path(prefixes).is_dir():
        step = "it must be where every machine can read it"
        raise ConfigError("app prefixes", expected="a folder", found=str(prefixes), next_step=step)
    return None if prefixes is None else Path(prefixes)


def _key(given: str | None) -> str | None:
    key = given or os.environ.get(KEY) or None
    if key is None:
        _log.warning("whoever reaches Ray Serve may use the model: there is no api_key, nor %s", KEY)
    return key


def _deployment(
    rows: int, waiting: int, num_gpus: float, num_replicas: int | str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What Ray is told of the deployment."""
    chosen: dict[str, Any] = {
        # Ray's own limit of five would leave rows empty.
        "max_ongoing_requests": rows + waiting,
        "max_queued_requests": waiting,
        "graceful_shutdown_timeout_s": Limits.grace,
    }
    if num_replicas is not None:
        chosen["num_replicas"] = num_replicas
    if num_replicas == "auto":
        chosen["autoscaling_config"] = {}
    chosen |= {**options, "ray_actor_options": {"num_gpus": num_gpus, **options.get("ray_actor_options", {})}}
    if isinstance(scaling := chosen.get("autoscaling_config"), Mapping):
        # Ray's own target of two would start a replica where rows are free.
        chosen["autoscaling_config"] = {"target_ongoing_requests": rows, **scaling}
    return chosen


def _read(name: str, value: Any) -> Any:
    """A value that may have come from a command line, where everything is text."""
    kind = _NUMBERS.get(name)
    if kind is None or not isinstance(value, str) or (name == "num_replicas" and value == "auto"):
        return value
    try:
        return kind(value)
    except ValueError as error:
        raise ConfigError(f"app {name}", expected="a number", found=repr(value)) from error


_NUMBERS: Mapping[str, Callable[[str], float]] = {
    **dict.fromkeys(("rows", "capacity", "waiting", "threads", "num_replicas"), int),
    "num_gpus": float,
}
