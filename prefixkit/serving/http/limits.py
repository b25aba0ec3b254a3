"""What one request, and one server, may take."""

from __future__ import annotations

from dataclasses import dataclass

from prefixkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the server.

    Attributes:
        body: bytes of a request's body.
        prompts: in one request.
        seconds: from a request to the end of its answer; None without an end.
        grace: seconds that running requests have to finish when the server is told to stop.
    """

    body: int = 4 * 2**20
    prompts: int = 64
    seconds: float | None = 600.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        if self.body < 1:
            raise ConfigError("--max-body", expected="1 byte or more", found=str(self.body))
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError("--request-timeout", expected="more than 0 seconds", found=f"{self.seconds:g}")
