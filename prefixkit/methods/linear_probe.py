"""Linear probe: the frozen backbone as it is, and a head that reads it. The baseline of every method with a head."""

from __future__ import annotations

from dataclasses import dataclass

from prefixkit.errors import ConfigError
from prefixkit.methods.method import Material, Method
from prefixkit.settings import check_types


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained: the head alone."""

    name: str = "linear-probe"
    length: int = 0
    init: str = "random"

    def __post_init__(self) -> None:
        check_types(self, "method.")
        if self.length:
            raise ConfigError("--length", expected="0, as a probe has no prompt", found=str(self.length))

    @property
    def default_lr(self) -> float:
        """That of a head."""
        return 1e-2

    def on(self, kind: str) -> Settings:
        """The same on any backbone."""
        return self


def make(settings: Settings, material: Material) -> Method:
    """Refused: there is nothing to train but a head. Raises ConfigError where the task has none."""
    step = "use --task classification or --task tagging"
    raise ConfigError("--method linear-probe", expected="a task that a head answers", found="another", next_step=step)
