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
from prefixkit.format.manifest import Manifest, Provenance, TaskRecord
from prefixkit.methods.document import read_document, refuse_overlong
from prefixkit.prefix import Prefix
from prefixkit.task import ModelTokenizer, load_task, load_tokenizer


def capture(backbone: Decoder | str | Path, text: str | Path, *, task: str = "continuation") -> Prefix:
    """The prefix that stands for the context in the file `text`.

    Args:
        backbone: a loaded backbone, a folder or a hub id.
        task: how the text that follows is written, a ready-made task or a TOML file. Where it puts a BOS before a text,
            the context begins with that BOS, and the file says so.

    Raises:
        ConfigError: a file that cannot be read, one that leaves no room for text, or another task.
        BackboneError: a context that a sliding window would swallow.
    """
    decoder = backbone if isinstance(backbone, Decoder) else load_decoder(backbone)
    tokenizer, context = load_tokenizer(decoder.folder), read_document(text)
    wanted = load_task(task, tokenizer, max_length=decoder.context_length or _LONG)
    tokens = [*_bos(wanted, tokenizer), *tokenizer.encode_text(context)]
    refuse_overlong(text, tokens, decoder.longest_text)
    captured = decoder.key_values_of(tokens)
    provenance = Provenance(
        method="capture",
        prefixkit=__version__,
        data_hash=f"b3-v1:{blake3(context.encode()).hexdigest()}",
        metrics={"tokens": float(len(tokens))},
    )
    room = decoder.room_behind(captured)
    told = replace(
        wanted,
        bos="none" if wanted.bos == "none" else "before",
        max_length=wanted.max_length if room is None else min(wanted.max_length, room),
        filler_id=tokenizer.eos_id,
    )
    manifest = Manifest(backbone=decoder.identity, injections=(captured.record(),), provenance=provenance, task=told)
    return Prefix(manifest, captured.arrays())


_LONG = 2048
"""Tokens of text where positions have no end, as in training."""


def _bos(task: TaskRecord, tokenizer: ModelTokenizer) -> list[int]:
    return [] if task.bos == "none" or tokenizer.bos_id is None else [tokenizer.bos_id]
