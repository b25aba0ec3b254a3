"""In-context capture: the keys and values of a real context as a prefix, exactly, with no training.

What follows gets the logits that it would get with the context in front of it: few-shot examples (Brown et al. 2020,
arXiv 2005.14165) or a system prompt, read once instead of with every request.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from prefixkit import __version__
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.load import load_decoder
from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Manifest, Provenance, TaskRecord
from prefixkit.injections import KeyValuePrefix
from prefixkit.prefix import Prefix
from prefixkit.task import ModelTokenizer, encode_context, load_task, load_tokenizer


def capture(
    backbone: Decoder | str | Path, text: str, *, task: str | Path = "continuation", where: str = "context"
) -> Prefix:
    """The prefix that stands for the context `text`.

    Args:
        backbone: a loaded backbone, a folder or a hub id.
        text: what stands before every prompt; for a chat task the system message. Elsewhere the spelling of a special
            token is plain text in it.
        task: how the text that follows is written, a ready-made task or a TOML file. Where it puts a BOS before a text,
            the context begins with that BOS, and the file says so.
        where: what messages call the text.

    Raises:
        ConfigError: no token, a text that the context or a sliding window does not hold, or another task.
        BackboneError: a backbone that cannot be used.
    """
    decoder = backbone if isinstance(backbone, Decoder) else load_decoder(backbone)
    tokenizer = load_tokenizer(decoder.folder)
    asked = load_task(task, tokenizer, max_length=decoder.context_length or _LONG)
    tokens = encode_context(asked, tokenizer, text, where=where)
    _refuse_unreadable(decoder, len(tokens), where)
    captured = decoder.key_values_of(tokens)
    provenance = Provenance(
        method="capture",
        prefixkit=__version__,
        data_hash=f"b3-v1:{blake3(text.encode()).hexdigest()}",
        metrics={"tokens": float(len(tokens))},
    )
    manifest = Manifest(
        backbone=decoder.identity,
        injections=(captured.record(),),
        provenance=provenance,
        task=_behind(captured, asked, decoder, tokenizer),
    )
    return Prefix(manifest, captured.arrays())


_LONG = 2048
"""Tokens of text where positions have no end, as in training."""
_LEAST_ROOM = 2
"""A token to ask with, and one to answer."""


def _refuse_unreadable(decoder: Decoder, length: int, where: str) -> None:
    if not length:
        raise ConfigError(where, expected="at least one token", found="none", next_step="give some text")
    limits = [(one.window - 1, f"a sliding window of {one.window}") for one in decoder.geometry if one.window]
    if (context := decoder.context_length) is not None:
        limits.append((context - _LEAST_ROOM, f"a context of {context}, {_LEAST_ROOM} left for what follows"))
    most, why = min(limits, default=(length, ""))
    if length > most:
        raise ConfigError(where, expected=f"at most {most} tokens ({why})", found=f"{length}", next_step="shorten it")


def _behind(captured: KeyValuePrefix, task: TaskRecord, decoder: Decoder, tokenizer: ModelTokenizer) -> TaskRecord:
    """`task` for what follows the context: its BOS has been given, its room is what is left."""
    room = decoder.room_behind(captured)
    return replace(
        task,
        bos="none" if task.bos == "none" else "before",
        max_length=task.max_length if room is None else min(task.max_length, room),
        filler_id=tokenizer.eos_id,
    )
