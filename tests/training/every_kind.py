"""Every method that is trained, on a family of each kind of backbone, prepared as the command line does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixkit.cli.run_options import settings_of
from prefixkit.methods.catalogue import METHODS, TRAINED
from prefixkit.training.config import from_mapping
from prefixkit.training.preparation import Prepared, prepare
from tests.matrix.families import EXCEPTIONS, FAMILIES, cell_of

KINDS = ("llama", "gpt2", "bert", "modernbert", "bart", "t5", "vit")
PAIRS = [
    *(("p-tuning-v2", family) for family in ("roberta", "electra", "distilbert")),
    *(("visual-prompt-tuning", family) for family in ("deit", "dinov2")),
    ("prefix-tuning", "flan"),
    *(
        (method, family)
        for method in TRAINED
        for family in KINDS
        if FAMILIES[family].kind in METHODS[method].backbones and (method, family) not in EXCEPTIONS
    ),
]
_NAMES = {"o": "output"}
_NUMBERS = ("length", "steps")


def prepared(method: str, family: str, path: Path, **changes: Any) -> Prepared:
    """The run of `method` on a tiny model of `family`, everything written below `path`."""
    command = cell_of(method, family, path).train[1:]
    given: dict[str, Any] = {}
    assignments = []
    for flag, value in zip(command[::2], command[1::2], strict=True):
        name = flag.lstrip("-")
        if name == "set":
            assignments.append(value)
        else:
            given[_NAMES.get(name, name)] = int(value) if name in _NUMBERS else value
    return prepare(from_mapping({**settings_of(None, given, assignments), **changes}))
