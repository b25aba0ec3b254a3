"""What every operation makes: a prefix with parents, and what to tell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefixkit import __version__
from prefixkit.algebra.inherited import shared_backbone, shared_rounding
from prefixkit.errors import ConfigError, MismatchError
from prefixkit.format.manifest import InjectionRecord, Manifest, Provenance, TaskRecord
from prefixkit.prefix import Array, Prefix, content_of, matches


@dataclass(frozen=True)
class Derived:
    """The result of an operation.

    Attributes:
        prefix: not saved yet. Its provenance names the operation (`config["operation"]`) and the content digests of its
            parents; metrics are not inherited, as nobody measured them on it.
        notes: a sentence each: what is rounded, what is a choice, what was left behind.
    """

    prefix: Prefix
    notes: tuple[str, ...] = ()


def derived(
    parents: Sequence[Prefix],
    operation: Mapping[str, Any],
    records: Sequence[InjectionRecord],
    tensors: dict[str, Array],
    *,
    task: TaskRecord | None,
    notes: Sequence[str] = (),
) -> Derived:
    """What `operation` makes of `parents`: of the backbone it states what all of them do, the provenance is its own."""
    ours = [parent.manifest.provenance for parent in parents]
    alone = ours[0] if len(ours) == 1 else None
    (backbone, unbound), (rounding, mixed) = shared_backbone(parents), shared_rounding(parents)
    provenance = Provenance(
        method="+".join(dict.fromkeys(one.method for one in ours)),
        prefixkit=__version__,
        config={**operation, **rounding},
        seed=alone.seed if alone else None,
        data_hash=alone.data_hash if alone else None,
        parents=tuple(content_of(parent) for parent in parents),
    )
    manifest = Manifest(backbone=backbone, injections=tuple(records), task=task, provenance=provenance)
    return Derived(Prefix(manifest, tensors), (*notes, *unbound, *mixed))


def refuse_strangers(prefixes: Sequence[Prefix], what: str) -> None:
    """Refuse prefixes that do not belong together.

    Raises:
        ConfigError: fewer than two; other injections than the first one's; other dtypes.
        MismatchError: another backbone than one before it.
    """
    if len(prefixes) < 2:
        raise ConfigError(what, expected="two prefixes or more", found=str(len(prefixes)))
    first = prefixes[0]
    for number, other in enumerate(prefixes[1:], start=2):
        where = f"{what}: prefix {number}"
        # With each: one that does not know its weights agrees with two that differ.
        for earlier, before in enumerate(prefixes[: number - 1], start=1):
            whose = "the first one's backbone" if earlier == 1 else f"the backbone of prefix {earlier}"
            _refuse_another_backbone(before, other, where, whose)
        expected, found = _kinds(first), _kinds(other)
        if expected != found:
            raise ConfigError(where, expected=f"{expected[:_SHOWN]}, as in the first", found=found[:_SHOWN])
        for name, array in first.tensors.items():
            theirs = other.tensors[name].dtype
            if theirs != array.dtype:
                step = f"`prefixkit cast --dtype {array.dtype}` it first"
                raise ConfigError(f"{where}: {name}", expected=str(array.dtype), found=str(theirs), next_step=step)


_SHOWN = 200
"""Characters of a list of injections that a message shows: a delta may name hundreds of parameters."""


def shared_task(prefixes: Sequence[Prefix]) -> tuple[TaskRecord | None, tuple[str, ...]]:
    """The first usage contract that one of `prefixes` has, with the shortest text, and what to tell of it."""
    tasks = [prefix.manifest.task for prefix in prefixes if prefix.manifest.task is not None]
    if not tasks:
        return None, ()
    kept = replace(tasks[0], max_length=min(task.max_length for task in tasks))
    others = [task.name for task in tasks[1:] if replace(task, max_length=kept.max_length) != kept]
    if not others:
        return kept, ()
    return kept, (f"tasks differ: the first one's ({kept.name}) is kept, not that of {', '.join(others)}",)


def _refuse_another_backbone(one: Prefix, other: Prefix, where: str, whose: str) -> None:
    try:
        matches(one, other.manifest.backbone)
    except MismatchError as error:
        raise MismatchError(where, expected=f"{whose}, {error.expected}", found=error.found) from error


def _kinds(prefix: Prefix) -> str:
    """The injections of `prefix`, each with its place, sorted."""
    parts = ("kind", "stack", "attention", "placement", "mode", "reads", "labels", "names")
    told = [[str(getattr(record, part)) for part in parts if getattr(record, part)] for record in _records(prefix)]
    return ", ".join(sorted(" ".join(words) for words in told))


def _records(prefix: Prefix) -> list[InjectionRecord]:
    # "prepend" is what keys and values have without saying so.
    records = prefix.manifest.injections
    return [replace(record, placement=None) if record.placement == "prepend" else record for record in records]
