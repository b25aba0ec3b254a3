"""Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): a long document as a short trained prefix.

The prefix starts as the keys and values of the document's first tokens, the first slot stays as the attention sink that
it is, and training makes the model with the prefix predict what the model with the whole document predicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods import initialization, start
from prefixkit.methods.document import read_document, refuse_overlong
from prefixkit.methods.method import FILE, Material
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.settings import at_least, check_types


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        document: the text file that the prefix stands for.
        length: prefix slots.
        init: `document` (its first tokens), `random` or `prefix:FILE`.
        frozen_slots: leading slots that stay, where the start is the document.
        top: how many of the teacher's likeliest tokens are imitated; 20 in the authors' code. A small backbone is sure
            of little: what it knows is spread over more of them.
    """

    name: str = "cartridge"
    document: str = field(default="", metadata=FILE)
    length: int = 48
    init: str = "document"
    frozen_slots: int = 1
    top: int = 20

    def __post_init__(self) -> None:
        check_types(self, "method.")
        at_least("--length", self.length, 1)
        at_least("frozen_slots", self.frozen_slots, 0)
        at_least("top", self.top, 1)

    @property
    def default_lr(self) -> float:
        """That of the authors' long runs."""
        return 2e-2

    def on(self, kind: str) -> Settings:
        """The same: there is one kind of backbone for it."""
        return self


def make(settings: Settings, material: Material) -> PrefixTuning:
    """A cartridge at its start, with the document as its teacher.

    Raises:
        ConfigError: no document, one that is shorter than the prefix, or a start that is not known.
        BackboneError: a document that the context or a sliding window does not hold.
    """
    if not settings.document:
        step = "add --set method.document=FILE"
        raise ConfigError("method.document", expected="the text file to stand for", found="none", next_step=step)
    tokens = start.words(material, read_document(settings.document))
    if len(tokens) <= settings.length:
        found, step = f"one of {len(tokens)} tokens", f"use --length {max(1, len(tokens) // 4)}, or `prefixkit capture`"
        raise ConfigError(
            settings.document, expected=f"a document longer than {settings.length} tokens", found=found, next_step=step
        )
    refuse_overlong(settings.document, tokens, material.backbone.longest_text)
    teacher = material.backbone.key_values_of(tokens)
    assert isinstance(teacher, KeyValuePrefix)
    method = PrefixTuning(_start(settings, material, teacher, tokens))
    method.teacher, method.top = teacher, settings.top
    return method


def _start(settings: Settings, material: Material, document: KeyValuePrefix, tokens: list[int]) -> KeyValuePrefix:
    match settings.init.partition(":"):
        case "document", "", _:
            return replace(
                document,
                keys=tuple(key[:, : settings.length] for key in document.keys),
                values=tuple(value[:, : settings.length] for value in document.values),
                positions=Positions(text_start=settings.length),
                frozen_slots=settings.frozen_slots,
            )
        case "random", "", _:
            drawn = initialization.random_like(material.backbone, tokens, settings.length, material.seed)
            assert isinstance(drawn, KeyValuePrefix)
            return drawn
        case "prefix", _, file if file:
            return start.from_parent(material, file, settings.length, KeyValuePrefix)
    raise start.unknown(settings.name, settings.init)
