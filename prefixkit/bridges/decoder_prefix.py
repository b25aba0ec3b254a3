"""The keys and values of a decoder's prefix, or the reason why a runtime cannot take it."""

from __future__ import annotations

from prefixkit.bridges.in_words import RUNTIMES, of_whom, placed, starting
from prefixkit.errors import FormatError
from prefixkit.prefix import Array, Prefix, key_values

_FOLD = "`prefixkit export --onnx` folds a prompt into them: use the prefix.safetensors of its folder"


def keys_and_values(prefix: Prefix, runtime: str, *, any_start: bool = False) -> list[tuple[Array, Array]]:
    """Key and value [kv_heads, prefix, head_dim] of each layer of `prefix`, for `runtime` (its title).

    Args:
        any_start: the runtime can let text start elsewhere than right behind the prefix.

    Raises:
        FormatError: something besides keys and values before the text of a decoder, or text that starts elsewhere.
    """
    for expected, found, step in (_kind(prefix, runtime), ("", "", "") if any_start else _start(prefix, runtime)):
        if found:
            raise FormatError(of_whom(prefix), expected=expected, found=found, next_step=step or RUNTIMES)
    return key_values(prefix)


def _kind(prefix: Prefix, runtime: str) -> tuple[str, str, str]:
    records, stacks = prefix.manifest.injections, prefix.manifest.backbone.stacks
    expected, record = f"keys and values before the text of a decoder, which {runtime} takes", records[0]
    if "encoder" in stacks:
        return expected, f"a prefix for an encoder{'-decoder' if 'decoder' in stacks else ''}", ""
    if [(one.kind, one.stack) for one in records] != [("key_value_prefix", "decoder")]:
        kinds = " and ".join(dict.fromkeys(one.kind for one in records))
        if kinds != "embedding_prompt":
            return expected, kinds, ""
        if record.placement in (None, "prepend"):
            return expected, kinds, _FOLD
        return expected, f"{kinds} {placed(record.placement)}", ""
    return expected, f"some {placed(record.placement)}" if record.infix else "", ""


def _start(prefix: Prefix, runtime: str) -> tuple[str, str, str]:
    record = prefix.manifest.injections[0]
    length, positions = record.length, record.positions
    expected = f"text that starts at position {length}, right behind the prefix, as {runtime} counts"
    elsewhere = positions is None or positions.text_start != length
    return expected, starting(positions) if elsewhere else "", ""
