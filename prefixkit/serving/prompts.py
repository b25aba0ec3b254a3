"""From what a user gives to token ids that the context has room for, as the prefix's usage contract says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral

from prefixkit.errors import DataError, InputError
from prefixkit.format.manifest import TaskRecord
from prefixkit.serving.report import ExportedFolder
from prefixkit.task import (
    Fields,
    ModelTokenizer,
    check_task,
    encode_prompt,
    input_fields,
    load_task,
    render_chat,
    stop_ids,
)
from prefixkit.task.chat import Message
from prefixkit.task.encode import is_chat

DEFAULT_NEW_TOKENS = 128
NEW_TOKENS = "max_new_tokens"
"""Where the error is that says how many tokens may be asked for."""
LEAST_NEW_TOKENS = 16
"""What a prompt must leave for its answer, unless fewer are asked for."""
UNBOUNDED = 2**31
"""Tokens of a task that sets no limit: what the context has room for, serving knows."""


def encode(
    task: TaskRecord,
    tokenizer: ModelTokenizer,
    given: str | Fields | tuple[int, ...],
    where: str,
    most: int = UNBOUNDED,
) -> tuple[list[int], Sequence[int]]:
    """The token ids of a whole prompt, however long, and of the tokens that end its answer.

    Args:
        given: the task's fields by name; or as text: its only field, a chat's user message, several fields as JSON; or
            token ids, which are taken as they are.
        most: tokens that there is room for. A text that surely has more is refused before it is tokenised.

    Raises:
        InputError: other fields than the task's, an empty prompt, or a text that is far too long.
    """
    check_task(task, tokenizer)
    if isinstance(given, tuple):
        ids = list(given)
    else:
        fields = _named(task, given, where) if isinstance(given, str) else given
        _refuse_other(fields, where)
        _refuse_hopeless(task, tokenizer, fields, most, where)
        ids = encode_prompt(replace(task, max_length=UNBOUNDED), tokenizer, fields, where=where)
    if not ids:
        raise InputError(where, expected="at least one token", found="none", next_step="give some text")
    return ids, stop_ids(task, tokenizer)


def plain_text(tokenizer: ModelTokenizer, *, paired: bool = False) -> TaskRecord:
    """The contract of a bare model: text is continued as it stands, or read by an encoder as the task `text` has it."""
    if paired:
        return load_task("text", tokenizer, max_length=UNBOUNDED, kind="encoder-decoder")
    return TaskRecord(
        name="plain",
        input_template="{input}",
        separator="",
        target_template="{target}",
        bos="after" if tokenizer.adds_bos else "none",
        stop=tokenizer.stop,
        max_length=UNBOUNDED,
    )


def room_for(task: TaskRecord, context: int | None, tokens: int, asked: int | None, where: str) -> int:
    """How many tokens the context has left behind a prompt of `tokens`; nothing is cut off a prompt that is too long.

    Args:
        context: positions from the prompt's first on, None without an end.
        asked: how many tokens are to be written, None for as many as fit.

    Raises:
        InputError: too few are left for an answer, of the context or of the task's `max_length`.
    """
    limit = min(task.max_length, context or UNBOUNDED)
    least = min(asked or LEAST_NEW_TOKENS, LEAST_NEW_TOKENS)
    if tokens > max(limit - least, 0):
        whose = "the context has" if limit == context else f"the task {task.name!r} allows"
        expected = f"at most {max(limit - least, 0)} tokens, which leave {least} of the {limit} that {whose}"
        raise InputError(where, expected=expected, found=f"{tokens}", next_step="shorten it")
    return (context or UNBOUNDED) - tokens


def room_behind_source(task: TaskRecord, context: int | None, tokens: int, asked: int | None, where: str) -> int:
    """How many tokens an encoder-decoder can write: all that its context has, which the source of `tokens` also may.

    Raises:
        InputError: too long a source, or one that leaves too little of the task's `max_length`, which counts both.
    """
    room_for(task, None, tokens, asked, where)
    if context is not None and tokens > context:
        expected = f"at most {context} tokens, the context"
        raise InputError(where, expected=expected, found=f"{tokens}", next_step="shorten it")
    return context or UNBOUNDED


def new_tokens(asked: int | None, room: int, where: str) -> int:
    """How many tokens to write at most. Raises InputError for a number that was asked for and does not fit."""
    if asked is not None and not (_is_whole(asked) and 1 <= asked <= room):
        expected = f"from 1 to {room} new tokens, which the context has left behind {where}"
        raise InputError(NEW_TOKENS, expected=expected, found=f"{asked}")
    return asked or min(DEFAULT_NEW_TOKENS, room)


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral)


def baked_start(report: ExportedFolder) -> int:
    """The position of the first token behind a prefix inside the graph, 0 without one."""
    if not report.baked or report.prefix is None:
        return 0
    starts = (record.positions.text_start for record in report.prefix.injections if record.positions is not None)
    return max(starts, default=0)


def refuse_unknown(ids: Sequence[int], vocabulary: int, where: str) -> None:
    """Raise InputError for token ids that a model with so large a vocabulary does not know."""
    unknown = next((token for token in ids if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise InputError(where, expected=f"token ids from 0 to {vocabulary - 1}", found=f"{unknown}")


def _refuse_hopeless(task: TaskRecord, tokenizer: ModelTokenizer, fields: Fields, most: int, where: str) -> None:
    """Raise InputError for a text that has more than `most` tokens whatever it says."""
    text = "".join(map(_written, fields.values()))
    if is_chat(task) and tokenizer.surely_more(text, most):
        # A template may leave out some of what it is given.
        (given,) = fields.values()
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        text = render_chat(tokenizer, messages, where=where).removeprefix(tokenizer.bos or "")
    if tokenizer.surely_more(text, most):
        found = f"a text of {len(text)} characters, which has more"
        raise InputError(where, expected=f"at most {most} tokens", found=found, next_step="shorten it")


def _written(value: str | Sequence[Message]) -> str:
    """A field, or all that a conversation says."""
    return value if isinstance(value, str) else "".join(str(part) for message in value for part in message.values())


def _refuse_other(given: object, where: str) -> None:
    """Raise InputError for what are no fields, or not made of text; types are not checked where users write."""
    if not isinstance(given, Mapping):
        expected, found = "text, fields by name, or a tuple of token ids", type(given).__name__
        raise InputError(where, expected=expected, found=found)
    for name, value in given.items():
        conversation = isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)
        if not isinstance(value, str) and not conversation:
            raise DataError(where, expected=f"text as {name!r}", found=type(value).__name__)


def _named(task: TaskRecord, text: str, where: str) -> Fields:
    names = ("input",) if is_chat(task) else input_fields(task)
    if len(names) == 1:
        return {names[0]: text}
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        listed = ", ".join(repr(name) for name in names)
        raise InputError(where, expected=f"a JSON object with the fields {listed}", found="other text")
    return fields
