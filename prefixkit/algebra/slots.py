"""The slots of a prefix: which tensors have them, where they stand, and what moving them would take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from prefixkit.algebra.rotation import Rotation
from prefixkit.errors import ConfigError
from prefixkit.format import names
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, Positions, TaskRecord
from prefixkit.prefix import Array, Prefix

_WITHOUT_ROTATION = (
    *("albert", "bart", "bert", "bloom", "deit", "dinov2", "dinov2_with_registers", "distilbert", "electra"),
    *("gpt2", "gpt_bigcode", "gpt_neo", "mpt", "opt", "roberta", "t5", "vit"),
)
"""Families that turn no keys. A family that is not here and states no RoPE parameters may turn them all the same."""


def slots_of(prefix: Prefix, what: str) -> Iterator[tuple[InjectionRecord, dict[str, int]]]:
    """Each injection of `prefix`, and the axis of the slots in each of its tensors.

    Raises:
        ConfigError: an injection without slots, or one whose slots are places of the text.
    """
    for record in prefix.manifest.injections:
        upon_text = record.placement == "slots" or record.mode == "add"
        if record.length is None or upon_text:
            found = f"{record.kind} upon places of the text" if upon_text else record.kind
            raise ConfigError(what, expected="keys and values or prompts before the text", found=found)
        yield record, _axes(record, prefix.manifest.backbone)


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
        raise ConfigError(what, expected=expected, found=f"text that starts at {positions.text_start}")
    return replace(positions, text_start=length)


def turns(prefix: Prefix, record: InjectionRecord) -> bool:
    """Whether moving the slots of `record` turns its keys, as far as the manifest can tell."""
    backbone = prefix.manifest.backbone
    takes = record.positions is None or record.positions.prefix_takes_positions
    rotary = backbone.rope is not None or backbone.family not in _WITHOUT_ROTATION
    return record.kind == "key_value_prefix" and takes and rotary


def moved(prefix: Prefix, record: InjectionRecord, name: str, by: int, rotations: Sequence[Rotation] | None) -> Array:
    """The tensor `name` of `record`, with its slots moved by `by` positions from where a prefix stands alone.

    Raises:
        ConfigError: it would have to be turned, and nobody says how.
    """
    array, parsed = prefix.tensors[name], names.parse(name)
    if not by or not turns(prefix, record) or parsed is None or parsed.role != "key" or parsed.layer is None:
        return array
    if rotations is None:
        raise ConfigError(
            "keys of a model with rotary positions",
            expected=f"the backbone, to move them by {by} positions",
            found="none",
            next_step=f"add --backbone with {prefix.manifest.backbone.name}",
        )
    return rotations[parsed.layer].moved(array, max(0, -by), by)


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
