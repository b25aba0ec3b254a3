"""`genai_config.json`: what onnxruntime-genai reads of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixkit.bridges.portable import GRAPH, Portable
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import TaskRecord
from prefixkit.prefix import Prefix
from prefixkit.task import load_tokenizer, stop_ids
from prefixkit.task.encode import is_chat, separator_ids
from prefixkit.task.tokenizer import ModelTokenizer

_ROOM = 2048
"""Tokens of text for a backbone that has no limit of its own; genai allocates no more than it needs."""


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids.

    Attributes:
        bos: what begins a text of the backbone; None where it has no such token.
        ends: what ends a text: for the task of the prefix, then for the backbone.
        pad: what fills shorter rows. genai takes all of them at the end of a row for padding, so that it is no token
            that a prompt of the task ends with.
    """

    bos: int | None
    ends: tuple[int, ...]
    pad: int


def special_tokens(prefix: Prefix, folder: Path) -> SpecialTokens:
    """Those of the tokenizer in `folder`. Raises BackboneError where no token ends a text."""
    task, tokenizer = prefix.manifest.task, load_tokenizer(folder)
    own = () if task is None else stop_ids(task, tokenizer)
    stops = (tokenizer.token_id(token) for token in tokenizer.stop)
    ends = tuple(dict.fromkeys((*own, *(id_ for id_ in stops if id_ is not None))))
    if not ends:
        step = "give its tokenizer_config.json an eos_token"
        expected, name = "a token that ends a text", prefix.manifest.backbone.name
        raise BackboneError(name, expected=expected, found="none", next_step=step)
    pad = _padding(task, tokenizer, ends[0], prefix.manifest.backbone.vocab_size)
    return SpecialTokens(tokenizer.bos_id, ends, pad)


def genai_config(made: Portable, tokens: SpecialTokens) -> dict[str, Any]:
    """The document. A text may be as long as the context without the prefix."""
    model, graph = made.facts["model"], made.facts["graph"]
    length = made.prefix.manifest.injections[0].length or 0
    room = model["context_length"] - length if model["context_length"] else _ROOM
    decoder = {
        **model["decoder"],
        "filename": GRAPH,
        "inputs": graph["inputs"],
        "outputs": graph["outputs"],
        # Level 3 leaves out a warning for each input that has a default.
        "session_options": {"log_severity_level": 3, "provider_options": []},
    }
    described = {
        # genai knows some architectures by name, and any other by its inputs.
        "type": "decoder",
        "vocab_size": model["vocab_size"],
        "context_length": room,
        "bos_token_id": tokens.ends[0] if tokens.bos is None else tokens.bos,
        "eos_token_id": list(tokens.ends),
        "pad_token_id": tokens.pad,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": room, "num_beams": 1, "past_present_share_buffer": False}
    return {"model": described, "search": search}


def _padding(task: TaskRecord | None, tokenizer: ModelTokenizer, end: int, vocabulary: int) -> int:
    own = tokenizer.named_id("pad_token")
    usual = end if own is None else own
    if task is None or is_chat(task):
        return usual
    last = separator_ids(task, tokenizer)[-1:]
    others: tuple[int, ...] = (usual, *tokenizer.special_ids.values(), *range(vocabulary))
    return next(id_ for id_ in others if [id_] != last)
