"""Words that are to be tagged, as token ids: where each of them begins is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task.encode import bos_id, separator_ids
from prefixkit.task.template import encodable
from prefixkit.task.tokenizer import ModelTokenizer

FIELD = "{tokens}"


@dataclass(frozen=True)
class EncodedWords:
    """Token ids, and where the words that fit begin in them.

    Attributes:
        lost: tokens that the input lost to fit.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    lost: int


def encode_words(task: TaskRecord, tokenizer: ModelTokenizer, words: Sequence[str], *, where: str) -> EncodedWords:
    """The ids of the prompt of `task` with `words` in the place of its field `tokens`.

    Each word is tokenised on its own, all but the first with a space before them. What is too long loses whole words
    from its end. Raises ConfigError for a template without the field, DataError for a word without a token.
    """
    before, field, after = task.input_template.partition(FIELD)
    if not field or "{" in before + after:
        found = repr(task.input_template)
        raise ConfigError(f"task {task.name}", expected=f"an input_template with {FIELD} alone", found=found)
    ids = [bos_id(task, tokenizer)] if task.bos == "after" else []
    ids += tokenizer.encode_marked([(before, True)])
    end = tokenizer.encode_marked([(after, True)]) + separator_ids(task, tokenizer)
    pieces = [_pieces(tokenizer, word, index, where) for index, word in enumerate(words)]
    starts: list[int] = []
    for piece in pieces:
        if len(ids) + len(piece) + len(end) > task.max_length:
            break
        starts.append(len(ids))
        ids += piece
    lost = sum(map(len, pieces[len(starts) :]))
    return EncodedWords(tuple(ids + end), tuple(starts), lost)


def _pieces(tokenizer: ModelTokenizer, word: str, index: int, where: str) -> list[int]:
    pieces = tokenizer.encode_text(encodable(word if index == 0 else f" {word}", where))
    if not pieces:
        raise DataError(where, expected="words that the tokenizer knows", found=repr(word))
    return pieces
