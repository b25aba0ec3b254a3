"""A forward pass of a module's own, in the place of the one that its class gives it, until it is taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_NAME = "forward"


def give(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `module` work by `forward`; its hooks stay around it."""
    module.__dict__[_NAME] = forward


def has_one(module: nn.Module) -> bool:
    """Whether `give` was called for `module`."""
    return _NAME in module.__dict__


def take_away(module: nn.Module) -> None:
    """Let `module` work as its class does, if it does not."""
    module.__dict__.pop(_NAME, None)
