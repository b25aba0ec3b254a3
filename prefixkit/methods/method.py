"""What a method is: settings that a user gives, and a module that makes what the backbone receives.

A method's file defines `Settings`, a frozen record that meets `MethodSettings`, and `make(settings, material)`. Methods
know no backbone: what they need of one is in `Backbone`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from prefixkit.injections import Injection
from prefixkit.methods.initialization import KeyValueSource

FILE: Mapping[str, Any] = {"file": True}
"""Marks a setting whose value is a path; the provenance keeps the hash of its content instead."""


class Method(nn.Module):
    """A module whose current parameters make what the backbone receives; calling it gives that, with gradients.

    Attributes:
        teacher: what the backbone with the method is to imitate the backbone with; None learns from the targets.
        top: how many of the teacher's likeliest tokens are imitated.
    """

    teacher: Injection | None = None
    top: int = 20

    @abstractmethod
    def forward(self) -> Injection:
        """What the current parameters make."""

    @abstractmethod
    def fold(self) -> Injection:
        """The same as constants: any reparametrisation is computed once and left behind."""


@runtime_checkable
class MethodSettings(Protocol):
    """What every method's settings have in common; the rest is the method's own."""

    @property
    def name(self) -> str:
        """As `--method` spells it."""
        ...

    @property
    def length(self) -> int:
        """Slots."""
        ...

    @property
    def init(self) -> str:
        """Where training starts: `KIND` or `KIND:ARGUMENT`."""
        ...

    @property
    def default_lr(self) -> float:
        """The peak learning rate that works unsearched."""
        ...

    def on(self, kind: str) -> MethodSettings:
        """The same on a backbone of this kind, with what its defaults mean there. Raises ConfigError."""
        ...


class Backbone(KeyValueSource, Protocol):
    """A frozen model, as far as methods need one."""

    @property
    def kind(self) -> str:
        """As `prefixkit methods` names it."""
        ...

    @property
    def hidden_size(self) -> int:
        """The width of token vectors."""
        ...

    @property
    def vocabulary(self) -> Tensor:
        """[vocab, hidden]: the vector of every token."""
        ...

    @property
    def layers(self) -> int:
        """How many layers receive a prompt of their own."""
        ...

    @property
    def patch_numbers(self) -> int:
        """How many numbers a patch of an image is made of."""
        ...

    def parameter_shapes(self, which: str, *, reading: bool) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its parameters of a kind, `bias` or `layernorm`, by name; `reading` leaves out its own head."""
        ...


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run has to offer a method.

    Attributes:
        backbone: the frozen model.
        words: the first tokens of the training data, at least as many as there are slots where it has that many.
        tokenize: the token ids of a text.
        labels: the answers of the task, tokenised; empty where it has no fixed answers.
        special_ids: tokens that are no text.
        bos_id: the token that the first slot has to hold, where the usage contract promises one.
        mask_id: the token that a masked language model writes at; None without one.
        slots: how many the task's template marks for a prompt; 0 puts it before the text.
        writes: whether the backbone itself answers, in words, and no trained head.
        seed: for random starts.
        parent: the injection in a prefix file, which is refused where it was made for another backbone.
    """

    backbone: Backbone
    words: Sequence[int]
    tokenize: Callable[[str], list[int]]
    parent: Callable[[str], Injection]
    labels: Sequence[Sequence[int]] = ()
    special_ids: Sequence[int] = ()
    bos_id: int | None = None
    mask_id: int | None = None
    slots: int = 0
    writes: bool = True
    seed: int = 0


class MethodFile(Protocol):
    """The module that a method's file is."""

    Settings: type[Any]

    def make(self, settings: Any, material: Material) -> Method:
        """The method at its start, with the settings that `MethodSettings.on` gave."""
        ...
