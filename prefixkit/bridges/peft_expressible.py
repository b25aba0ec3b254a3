"""What PEFT can express."""

from __future__ import annotations

from prefixkit.bridges.in_words import RUNTIMES, of_whom, placed, starting
from prefixkit.errors import FormatError
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.prefix import Prefix

_KEYS_AND_VALUES = ("key_value_prefix", "decoder", "self")


def expressible(prefix: Prefix) -> InjectionRecord:
    """The one injection of `prefix`.

    Raises:
        FormatError: PEFT has no folder for it.
    """
    for expected, found in (_kind(prefix), _place(prefix), _uniform(prefix)):
        if found:
            expected = f"what PEFT can express: {expected}"
            raise FormatError(of_whom(prefix), expected=expected, found=found, next_step=RUNTIMES)
    return prefix.manifest.injections[0]


def _kind(prefix: Prefix) -> tuple[str, str]:
    records, stacks = prefix.manifest.injections, prefix.manifest.backbone.stacks
    expected = "one prompt, or keys and values in a decoder's own attention"
    told = (".".join(filter(None, (record.kind, record.stack, record.attention))) for record in records)
    if "decoder" not in stacks:
        return expected, "a prefix for an encoder"
    one = records[0]
    of_a_kind = one.kind == "embedding_prompt" or (one.kind, one.stack, one.attention) == _KEYS_AND_VALUES
    return expected, "" if len(records) == 1 and of_a_kind else ", ".join(told)


def _place(prefix: Prefix) -> tuple[str, str]:
    record = prefix.manifest.injections[0]
    if record.placement not in (None, "prepend"):
        return "what stands before the text", f"some {placed(record.placement)}"
    expected = f"text that starts at position {record.length}, after the prefix"
    positions = record.positions
    return expected, "" if positions == Positions(text_start=record.length or 0) else starting(positions)


def _uniform(prefix: Prefix) -> tuple[str, str]:
    arrays = prefix.tensors.values()
    if len(shapes := {str(array.shape) for array in arrays}) > 1:
        return "the same shape for all keys and values", " and ".join(sorted(shapes))
    dtypes = {str(array.dtype) for array in arrays}
    return "one dtype for all keys and values", " and ".join(sorted(dtypes)) if len(dtypes) > 1 else ""
