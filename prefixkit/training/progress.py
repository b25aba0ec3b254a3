"""What a training run tells while it works. The command line draws it; a library caller may pass its own listener."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished step.

    Attributes:
        step, total: steps done and steps in all.
        loss: nats a target token, on this step's batch.
        tokens: real tokens of this step's batch, padding not counted.
    """

    step: int
    total: int
    loss: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One finished validation.

    Attributes:
        loss: nats a target token.
        best: whether it is the best so far.
        score: the accuracy or F1, 0 to 100, where that decides which is best.
    """

    step: int
    loss: float
    best: bool
    score: float | None = None


class Listener(Protocol):
    """Whoever wants to know."""

    def on_step(self, step: Step) -> None:
        """After every step."""

    def on_validation(self, validation: Validation) -> None:
        """After every validation."""

    def on_message(self, message: str) -> None:
        """A sentence for the user."""


class Silence:
    """A listener that ignores everything."""

    def on_step(self, step: Step) -> None:
        """Ignore it."""

    def on_validation(self, validation: Validation) -> None:
        """Ignore it."""

    def on_message(self, message: str) -> None:
        """Ignore it."""
