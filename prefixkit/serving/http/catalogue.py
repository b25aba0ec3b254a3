"""The models that a server names: the folder's prefix, those added to it, and the bare model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from prefixkit.errors import ConfigError, InputError
from prefixkit.format.manifest import Manifest, TaskRecord
from prefixkit.serving.http.errors import ApiError
from prefixkit.serving.prompts import UNBOUNDED
from prefixkit.serving.report import ExportedFolder
from prefixkit.serving.session import OWN
from prefixkit.spelling import did_you_mean
from prefixkit.task import ModelTokenizer, load_task
from prefixkit.task.encode import is_chat

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a request's `model` names.

    Attributes:
        name: as requests write it.
        prefix: the name of its prefix in the engine's session; None where there is none.
        manifest: what the prefix says of itself; None for the bare model.
        task: how it is asked; None where text is continued as it stands.
        conversation: how it is asked for the next message of a conversation; None where it is not.
        created: Unix time at which it was loaded.
    """

    name: str
    prefix: str | None
    manifest: Manifest | None
    task: TaskRecord | None
    conversation: TaskRecord | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it, with what its prefix is."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "prefixkit",
            "task": self.task.name if self.task is not None else None,
            "chat": self.conversation is not None,
            "prefix": _prefix_card(self.manifest),
        }


class Catalogue:
    """Models by name, in the order of their adding.

    Attributes:
        reserved: names that no file may take.
    """

    def __init__(self, report: ExportedFolder, tokenizer: ModelTokenizer) -> None:
        self._task = report.prefix.task if report.prefix is not None else None
        self._conversation = _conversation(tokenizer)
        self._models: dict[str, Model] = {}
        self.reserved = {OWN, report.backbone.name}
        if report.prefix is not None and (report.baked or report.prefix_file is not None):
            self._put(OWN, OWN, report.prefix)
        if not report.baked:
            self._put(report.backbone.name, None, None)

    def add(self, name: str, manifest: Manifest) -> None:
        """List the prefix `name` of the engine's session, in the place of one of that name."""
        self._put(name, name, manifest)

    def drop(self, name: str) -> None:
        """List it no more."""
        self._models.pop(name, None)

    def check(self, name: str) -> None:
        """Raise ConfigError for a name that a prefix may not have."""
        if not name.isprintable():
            # Bytes that are no UTF-8 among them, with which no list of models could be sent.
            expected = "a name of printable characters in UTF-8"
            raise ConfigError(ascii(name), expected=expected, found="others", next_step="rename it")
        if name in self.reserved:
            raise ConfigError(
                repr(name), expected="a name of its own", found="that of another model", next_step="rename it"
            )

    def find(self, name: str) -> Model:
        """Raises ApiError 404 for an unknown name."""
        if name not in self._models:
            message = f"the model {name[:200]!r} does not exist; {did_you_mean(name[:200], self._models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    def _put(self, name: str, prefix: str | None, manifest: Manifest | None) -> None:
        task = (manifest.task if manifest is not None else None) or self._task
        conversation = self._conversation if task is None else task if is_chat(task) else None
        self._models[name] = Model(name=name, prefix=prefix, manifest=manifest, task=task, conversation=conversation)


def _conversation(tokenizer: ModelTokenizer) -> TaskRecord | None:
    """How a model without a task of its own converses: as its tokenizer's chat template has it, if it has one."""
    if tokenizer.chat_template is None:
        return None
    try:
        return load_task("chat", tokenizer, max_length=UNBOUNDED)
    except InputError as error:
        _log.warning("no chats with the bare model: %s", error)
        return None


def _prefix_card(manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    return {"method": manifest.provenance.method, "length": length_of(manifest), "content": manifest.content}


def length_of(manifest: Manifest) -> int:
    """Slots that a prefix takes of a row."""
    return max((record.length for record in manifest.injections if record.length is not None), default=0)
