"""What a run offers its method: the words of its data, the promises of its task, and the files that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefixkit.backbones.backbone import Backbone
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection, injection
from prefixkit.methods.method import Material
from prefixkit.prefix import Prefix, load, matches
from prefixkit.task import SLOT_ID, ModelTokenizer, answer_ids, slots_of
from prefixkit.training.config import TrainConfig

_FROM_TEXT = ("text", "document")
"""Starts that can begin with a BOS."""


def material_for(
    config: TrainConfig,
    backbone: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer | None,
    encoded: Sequence[Any],
    parents: list[Prefix],
) -> Material:
    """What the method of `config` may ask for; `parents` gets every prefix file that it reads.

    Raises:
        ConfigError: the task wants a BOS in the prefix, which the start of the method cannot give.
    """

    def parent(path: str) -> Injection:
        found = load(path)
        matches(found, backbone.identity)
        parents.append(found)
        return injection(found)

    return Material(
        backbone=backbone,
        words=_own_words(encoded, config.method.length),
        tokenize=tokenizer.encode_text if tokenizer is not None else _no_words,
        parent=parent,
        labels=[answer_ids(task, tokenizer, word) for word in _answers(task)] if tokenizer is not None else (),
        special_ids=sorted(tokenizer.special_ids.values()) if tokenizer is not None else (),
        bos_id=_promised_bos(config, backbone, task, tokenizer) if tokenizer is not None else None,
        mask_id=tokenizer.named_id("mask_token") if tokenizer is not None else None,
        slots=slots_of(task),
        writes=task.answer is None,
        seed=config.seed,
    )


def _no_words(text: str) -> list[int]:
    raise ConfigError("--init", expected="a start without words, on images", found=repr(text))


def _answers(task: TaskRecord) -> list[str]:
    return list((task.verbalizer or {}).values()) or list(task.labels or ())


def _own_words(encoded: Sequence[Any], length: int) -> list[int]:
    """The first `length` tokens of the training data: the task itself, in the words it will be asked in.

    Of images, which have none, a number for each slot.
    """
    words: list[int] = []
    for example in encoded:
        words += [word for word in example.words if word != SLOT_ID] if hasattr(example, "words") else [0]
        if len(words) >= length:
            break
    return words


def _promised_bos(config: TrainConfig, backbone: Backbone, task: TaskRecord, tokenizer: ModelTokenizer) -> int | None:
    """The token that the first slot has to hold for `task`. Raises ConfigError where it cannot."""
    if task.bos != "before":
        return None
    if backbone.paired:
        expected, step = f'bos = "after" or "none" for an {backbone.kind}', "no slot stands before what it writes"
        raise ConfigError("task", expected=expected, found='"before"', next_step=step)
    if slots := slots_of(task):
        expected, step = 'bos = "after" or "none" for a task with slots', "no slot is known to stand at the front"
        raise ConfigError("task", expected=expected, found=f'"before", and {slots} slots', next_step=step)
    if config.method.init.partition(":")[0] not in _FROM_TEXT or tokenizer.bos_id is None:
        found = "none in the tokenizer" if tokenizer.bos_id is None else f"--init {config.method.init}"
        raise ConfigError("task", expected='for bos = "before" a prefix that starts from text with a BOS', found=found)
    return tokenizer.bos_id
