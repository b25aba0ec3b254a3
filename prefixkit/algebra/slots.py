"""The slots of a prefix: which tensors have them, where they stand, and what moving them would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefixkit.algebra.rotation import Rotation
from prefixkit.errors import ConfigError
from prefixkit.format import names
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, Positions, TaskRecord
from prefixkit.prefix import Array, Prefix
from prefixkit.rounding import rounded

_WITHOUT_ROTATION = (
    *("gpt2", "opt", "bloom", "bart", "t5", "bert", "roberta", "electra", "distilbert"),
    *("vit", "deit", "dinov2", "dinov2_with_registers"),
)
"""Families of the tests that turn no keys. Another one that states no RoPE parameters may turn them all the same."""
_PLACES = {"slots": "in slots of the text", "after_first": "behind the first token of the text"}


def slots_of(prefix: Prefix, what: str) -> list[tuple[InjectionRecord, dict[str, int]]]:
    """Each injection of `prefix`, and the axis of the slots in each of its tensors.

    Raises:
        ConfigError: an injection without slots, or one whose slots do not stand before the text.
    """
    for record in prefix.manifest.injections:
        place = _PLACES.get(record.placement or "", "added to the text" if record.mode == "add" else "")
        if record.length is None or place:
            found = f"{record.kind} {place}".rstrip()
            raise ConfigError(what, expected="keys and values or prompts before the text", found=found)
    backbone = prefix.manifest.backbone
    return [(record, _axes(record, backbone)) for record in prefix.manifest.injections]


def placed(record: InjectionRecord, length: int, what: str) -> Positions | None:
    """The positions of `record` with `length` slots: text starts right behind them, or where it would without them.

    Raises:
        ConfigError: text that starts elsewhere, for which there is no rule.
    """
    positions = record.positions
    if positions is None or not positions.prefix_takes_positions:
        return positions
    if positions.text_start != record.length:
        expected = f"text that starts at {record.length}, behind the prefix, or at 0 with one that takes no positions"
        found = f"text that starts at {positions.text_start} with one that takes positions"
        raise ConfigError(what, expected=expected, found=found)
    return replace(positions, text_start=length)


def turns(prefix: Prefix, record: InjectionRecord) -> bool:
    """Whether moving the slots of `record` turns its keys, as far as the manifest can tell."""
    backbone = prefix.manifest.backbone
    takes = record.positions is None or record.positions.prefix_takes_positions
    rotary = backbone.rope is not None or backbone.family not in _WITHOUT_ROTATION
    return record.kind == "key_value_prefix" and takes and rotary


def turned(prefix: Prefix, record: InjectionRecord, rotations: Sequence[Rotation] | None) -> bool:
    """Whether `rotations` turn keys of `record`: those of a model with ALiBi were measured, and turn none."""
    return turns(prefix, record) and any(len(rotation.frequencies) for rotation in rotations or ())


def refuse_unmovable(prefix: Prefix, what: str) -> None:
    """Refuse keys that turn, or may, where no backbone helps, as it is none whose rotation can be measured.

    Raises:
        ConfigError: such keys of an encoder.
    """
    backbone = prefix.manifest.backbone
    if "encoder" in backbone.stacks and any(turns(prefix, record) for record in prefix.manifest.injections):
        raise ConfigError(
            what,
            expected="keys of a decoder, or of an encoder without rotary positions",
            found=f"those of {backbone.family}, an encoder that turns them, or may",
            next_step="they cannot be moved; train them in one piece",
        )


def moved(
    prefix: Prefix, record: InjectionRecord, name: str, by: int, rotations: Sequence[Rotation] | None, where: str
) -> Array:
    """The tensor `name` of `record`, with its slots moved by `by` positions from where a prefix stands alone.

    Args:
        where: what a message names.

    Raises:
        ConfigError: it would have to be turned, and nobody says how.
        FormatError: turned, its numbers are beyond its dtype.
    """
    array, parsed = prefix.tensors[name], names.parse(name)
    if not by or not turns(prefix, record) or parsed is None or parsed.role != "key" or parsed.layer is None:
        return array
    if rotations is None:
        backbone = prefix.manifest.backbone
        raise ConfigError(
            f"keys of {backbone.family}, which {'turn' if backbone.rope else 'may turn'} with their positions",
            expected=f"the backbone, to move them by {by} positions",
            found="none",
            next_step=f"add --backbone with {backbone.name}",
        )
    exact = rotations[parsed.layer].moved(array.astype(np.float64), max(0, -by), by)
    step = "`prefixkit cast --dtype float32` first"
    return rounded(exact, array.dtype.name, where=f"{where}: {name}, turned", otherwise=step)


def refuse_too_long(prefix: Prefix, length: int, what: str) -> None:
    """Refuse `length` slots where a sliding window would swallow them, or the context has no room for text.

    Raises:
        ConfigError: such a length.
    """
    backbone = prefix.manifest.backbone
    limits = [
        (layer.window - 1, f"a sliding window of {layer.window}")
        for layers in backbone.stacks.values()
        for layer in layers
        if layer.window
    ]
    if backbone.context_length is not None:
        limits.append((backbone.context_length - 2, f"a context of {backbone.context_length}, 2 left for text"))
    most, why = min(limits, default=(length, ""))
    if length > most:
        raise ConfigError(what, expected=f"at most {most} slots ({why})", found=str(length))


def with_room(
    task: TaskRecord | None, backbone: BackboneIdentity, records: Sequence[InjectionRecord]
) -> TaskRecord | None:
    """`task`, with no longer texts than the context holds behind `records`."""
    starts = [record.positions.text_start for record in records if record.positions is not None]
    if task is None or backbone.context_length is None or not starts:
        return task
    return replace(task, max_length=min(task.max_length, backbone.context_length - max(starts)))


def _axes(record: InjectionRecord, backbone: BackboneIdentity) -> dict[str, int]:
    if record.kind == "embedding_prompt":
        return {names.PROMPT: 0}
    stack, attention = record.stack or "", record.attention or ""
    layers = range(len(backbone.stacks[stack]))
    if record.kind == "hidden_prompt":
        return {names.hidden(stack, layer): 0 for layer in layers}
    return {name(stack, attention, layer): 1 for layer in layers for name in (names.key, names.value)}
