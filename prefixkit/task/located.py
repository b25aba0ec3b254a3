"""Prompts in which the place of a field is known: to be cut there, or to be answered from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task.encode import bos_id, fit_prompt, input_fields, separator_ids
from prefixkit.task.template import fill
from prefixkit.task.tokenizer import ModelTokenizer

CHOICE = "choice"
"""The field that is filled with each choice."""


@dataclass(frozen=True)
class LocatedPrompt:
    """Token ids, and where the last field of the template stands in them.

    Attributes:
        places: for each id the characters of that field that it stands for, begin and end; equal where for none.
        lost: tokens that the input lost to fit.
    """

    ids: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    lost: int


def locate(task: TaskRecord, tokenizer: ModelTokenizer, fields: Mapping[str, str], *, where: str) -> LocatedPrompt:
    """The prompt of `task`, as `encode_prompt` gives it: what is too long loses tokens from its end.

    Raises DataError where nothing of the last field fits, and as `encode_prompt` does.
    """
    ids, lost = fit_prompt(task, tokenizer, fields, where=where)
    parts = list(fill(task.input_template, fields, where))
    body = tokenizer.encode_located(parts)
    begin, end = _field(parts, -1)
    places = [_within(first, last, begin, end) for _, first, last in body[: len(body) - lost]]
    if not any(first < last for first, last in places):
        expected, found = f"a part of {input_fields(task)[-1]!r} that fits", f"{lost} tokens too many"
        step = "shorten what stands before it, or raise max_length where the model's context allows"
        raise DataError(where, expected=expected, found=found, next_step=step)
    opening = [(0, 0)] if task.bos == "after" else []
    closing = [(0, 0)] * (len(ids) - len(opening) - len(places))
    return LocatedPrompt(tuple(ids), (*opening, *places, *closing), lost)


def fit_choice(
    task: TaskRecord, tokenizer: ModelTokenizer, fields: Mapping[str, str], choice: str, *, where: str
) -> tuple[list[int], int]:
    """The prompt of `task` with one choice in it, and how many tokens the input lost to fit.

    It loses them from the end of its first field, since the choices stand at the end and differ there. Raises DataError
    where that is not enough.
    """
    parts = list(fill(task.input_template, {**fields, CHOICE: choice}, where))
    body = tokenizer.encode_located(parts)
    opening = [bos_id(task, tokenizer)] if task.bos == "after" else []
    end = separator_ids(task, tokenizer)
    lost = max(0, len(opening) + len(body) + len(end) - task.max_length)
    begin, close = _field(parts, 0)
    inside = [index for index, (_, first, last) in enumerate(body) if begin <= first < close and last <= close]
    if lost > len(inside):
        found = f"{len(opening) + len(body) + len(end) - len(inside)} that cannot be shortened"
        step = "shorten the choices, or raise max_length where the model's context allows"
        raise DataError(where, expected=f"at most {task.max_length} tokens", found=found, next_step=step)
    dropped = set(inside[len(inside) - lost :])
    kept = [token for index, (token, _, _) in enumerate(body) if index not in dropped]
    return [*opening, *kept, *end], lost


def check_answer_fields(task: TaskRecord, where: str) -> None:
    """Raise ConfigError for a template without the fields that the answer of `task` needs."""
    names = input_fields(task)
    if task.answer == "choice" and CHOICE not in names[1:]:
        expected = "an input_template with {choice} behind another field"
        raise ConfigError(where, expected=expected, found=repr(task.input_template))
    if task.answer == "span" and len(names) < 2:
        expected = "an input_template with a question and, as its last field, the text that answers it"
        raise ConfigError(where, expected=expected, found=repr(task.input_template))


def _field(parts: Sequence[tuple[str, bool]], which: int) -> tuple[int, int]:
    """The characters of the first (0) or last (-1) field's value in the text of all `parts`."""
    index = [index for index, (_, literal) in enumerate(parts) if not literal][which]
    begin = sum(len(text) for text, _ in parts[:index])
    return begin, begin + len(parts[index][0])


def _within(first: int, last: int, begin: int, end: int) -> tuple[int, int]:
    """The characters from `first` to `last` that lie between `begin` and `end`, counted from `begin`."""
    first, last = max(first, begin) - begin, min(last, end) - begin
    return (first, last) if first < last else (0, 0)
