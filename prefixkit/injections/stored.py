"""Injections to and from the records and tensors of a prefix file."""

from __future__ import annotations

from prefixkit.errors import InputError
from prefixkit.format import names
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.injections.arrays import tensor
from prefixkit.injections.combined import Injection, One, joined, parts_of
from prefixkit.injections.key_value_prefix import KeyValuePrefix, KeyValuePrefixes
from prefixkit.injections.parameters import ParameterDelta, TaskHead
from prefixkit.injections.prompts import EmbeddingPrompt, HiddenPrompt
from prefixkit.prefix import Prefix, key_values


def records_of(received: Injection) -> tuple[InjectionRecord, ...]:
    """How a manifest describes `received`: one record, or one for each part."""
    return tuple(part.record() for part in parts_of(received))


def injection(prefix: Prefix) -> Injection:
    """What a loaded file injects, in the dtype that it is stored in.

    Raises:
        InputError: injections that this version cannot place together.
    """
    records, stacks = prefix.manifest.injections, prefix.manifest.backbone.stacks
    parts = tuple(_part(prefix, record) for record in records)
    prefixes = tuple(part for part in parts if isinstance(part, KeyValuePrefix))
    if len(prefixes) == len(parts) and stacks.keys() == {"encoder", "decoder"}:
        return KeyValuePrefixes(parts=prefixes)
    if len({type(part) for part in parts}) < len(parts):
        found = ", ".join(" ".join(filter(None, (record.kind, record.placement, record.mode))) for record in records)
        raise InputError("prefix", expected="one injection of a kind", found=found)
    return joined(parts)


def embedding_prompt(prefix: Prefix) -> EmbeddingPrompt:
    """The prompt of a loaded file. Raises InputError where it has none."""
    found = next((part for part in parts_of(injection(prefix)) if isinstance(part, EmbeddingPrompt)), None)
    if found is None:
        raise InputError("prefix", expected="a prompt", found=", ".join(_kinds(prefix)))
    return found


def key_value_prefix(prefix: Prefix) -> KeyValuePrefix:
    """The keys and values that a loaded file has for a decoder.

    Raises:
        InputError: it has none.
    """
    wanted = ("key_value_prefix", "decoder", "self")
    for record in prefix.manifest.injections:
        if (record.kind, record.stack, record.attention) == wanted:
            return _key_values(prefix, record)
    key_values(prefix)
    raise AssertionError("unreachable: key_values refuses what is not there")


def _kinds(prefix: Prefix) -> list[str]:
    return [record.kind for record in prefix.manifest.injections]


def _part(prefix: Prefix, record: InjectionRecord) -> One:
    match record.kind:
        case "key_value_prefix":
            return _key_values(prefix, record)
        case "embedding_prompt":
            return EmbeddingPrompt(
                embeddings=tensor(prefix.tensors[names.PROMPT]),
                positions=_positions(record),
                token_ids=record.token_ids,
                stack=record.stack or "decoder",
                placement=record.placement or "prepend",
            )
        case "hidden_prompt":
            return _hidden(prefix, record)
        case "parameter_delta":
            changed = record.names or ()
            return ParameterDelta(deltas={name: tensor(prefix.tensors[names.delta(name)]) for name in changed})
        case _:
            weight, bias = tensor(prefix.tensors[names.HEAD_WEIGHT]), tensor(prefix.tensors[names.HEAD_BIAS])
            return TaskHead(weight=weight, bias=bias, reads=record.reads or "first")


def _hidden(prefix: Prefix, record: InjectionRecord) -> HiddenPrompt:
    stack = record.stack or "encoder"
    layers = len(prefix.manifest.backbone.stacks[stack])
    return HiddenPrompt(
        hidden=tuple(tensor(prefix.tensors[names.hidden(stack, layer)]) for layer in range(layers)),
        mode=record.mode or "replace",
        placement=record.placement or "prepend",
        positions=_positions(record),
        stack=stack,
    )


def _positions(record: InjectionRecord) -> Positions:
    return record.positions or Positions(text_start=record.length or 0)


def _key_values(prefix: Prefix, record: InjectionRecord) -> KeyValuePrefix:
    stack, attention = record.stack or "", record.attention or ""
    pairs = [(tensor(key), tensor(value)) for key, value in key_values(prefix, stack=stack, attention=attention)]
    return KeyValuePrefix(
        keys=tuple(key for key, _ in pairs),
        values=tuple(value for _, value in pairs),
        positions=_positions(record),
        frozen_slots=record.frozen_slots or 0,
        stack=stack,
        attention=attention,
        placement=record.placement or "prepend",
    )
