"""The keys and values of a decoder's prefix, or the reason why a runtime cannot take it."""

from __future__ import annotations

from prefixkit.errors import FormatError
from prefixkit.prefix import Array, Prefix, key_values


def keys_and_values(prefix: Prefix, runtime: str, *, any_start: bool = False) -> list[tuple[Array, Array]]:
    """Key and value [kv_heads, prefix, head_dim] of each layer of `prefix`, for `runtime` (its title).

    Args:
        any_start: the runtime can let text start elsewhere than right behind the prefix.

    Raises:
        FormatError: something besides keys and values before the text of a decoder, or text that starts elsewhere.
    """
    records, stacks = prefix.manifest.injections, prefix.manifest.backbone.stacks
    expected = f"keys and values before the text of a decoder, which {runtime} takes"
    if "encoder" in stacks:
        found = f"a prefix for an encoder{'-decoder' if 'decoder' in stacks else ''}"
        raise FormatError("prefix", expected=expected, found=found)
    if [(record.kind, record.stack) for record in records] != [("key_value_prefix", "decoder")]:
        kinds = " and ".join(dict.fromkeys(record.kind for record in records))
        step = ""
        if kinds == "embedding_prompt":
            step = "`prefixkit export --onnx` folds a prompt into them: use the prefix.safetensors of its folder"
        raise FormatError("prefix", expected=expected, found=kinds, next_step=step)
    if records[0].infix:
        raise FormatError("prefix", expected=expected, found="some in slots of the text")
    length, positions = records[0].length, records[0].positions
    if not any_start and (positions is None or positions.text_start != length):
        found = "no positions" if positions is None else f"text that starts at {positions.text_start}"
        expected = f"text that starts at position {length}, right behind the prefix, as {runtime} counts"
        raise FormatError("prefix", expected=expected, found=found)
    return key_values(prefix)
