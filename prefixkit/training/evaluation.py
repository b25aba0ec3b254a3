"""How good a prefix is at its task: loss, and what it writes against every reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from prefixkit.backbones.backbone import Backbone
from prefixkit.data.readers import Example
from prefixkit.data.references import ReferenceGroup, group_references
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import Injection
from prefixkit.task import ModelTokenizer, decode_target, encode_prompt, encode_target, stop_ids
from prefixkit.training.metrics import generation_scores


@dataclass(frozen=True)
class Written:
    """One input, its references, and what the model wrote for it."""

    group: ReferenceGroup
    text: str


def write(
    backbone: Backbone,
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    groups: Sequence[ReferenceGroup],
    prefix: Injection | None,
    *,
    num_beams: int = 1,
    max_new_tokens: int = 100,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[Written]:
    """What the model writes for each group's input, in the order of `groups`.

    A long input is cut as it is in training: its longest reference fits behind it. `done` hears how many inputs were
    finished after each batch.

    Raises:
        DataError: an input or a reference that does not fit.
    """
    task = within_context(task, backbone, prefix)
    prompts = [_prompt(task, tokenizer, group) for group in groups]
    texts: dict[int, str] = {}
    for batch in _by_length(prompts, batch_size):
        written = backbone.generate(
            [prompts[index] for index in batch],
            prefix,
            stop=stop_ids(task, tokenizer),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
        )
        texts.update(zip(batch, (decode_target(task, tokenizer, row) for row in written), strict=True))
        done(len(texts))
    return [Written(group, texts[index]) for index, group in enumerate(groups)]


def within_context(task: TaskRecord, backbone: Backbone, prefix: Injection | None) -> TaskRecord:
    """`task` with no longer texts than `backbone`'s context has room for, behind `prefix`."""
    room = backbone.room_behind(prefix)
    return task if room is None or room >= task.max_length else replace(task, max_length=room)


def scores(written: Sequence[Written]) -> dict[str, float]:
    """The generation metrics of what was written; see `prefixkit.training.metrics`."""
    return generation_scores([one.text for one in written], [one.group.references for one in written])


def grouped(examples: Sequence[Example], limit: int | None = None) -> list[ReferenceGroup]:
    """Each input once with all its references, the first `limit` of them."""
    return group_references(examples)[:limit]


def ungrouped(groups: Sequence[ReferenceGroup]) -> list[Example]:
    """One example a reference, for the loss."""
    return [Example(group.fields, reference, group.where) for group in groups for reference in group.references]


def _prompt(task: TaskRecord, tokenizer: ModelTokenizer, group: ReferenceGroup) -> list[int]:
    targets = (encode_target(task, tokenizer, text, where=group.where) for text in group.references)
    return encode_prompt(task, tokenizer, group.fields, room=max(map(len, targets)), where=group.where)


def _by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
