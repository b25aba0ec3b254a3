"""The `encode` of a genai folder's README: a task's prompts by genai's tokenizer alone.

genai reads special tokens wherever they are spelled, and renders chat templates without trimming blocks and with other
special tokens than the folder's. So text is cut where it would spell one, and conversations come rendered.
"""

from __future__ import annotations

import re

from prefixkit.format.manifest import TaskRecord
from prefixkit.task.chat import render_chat
from prefixkit.task.encode import bos_id, input_fields, is_chat, separator_ids
from prefixkit.task.template import escape, fill
from prefixkit.task.tokenizer import ModelTokenizer

_PLAIN = """ADDED = json.loads(Path("tokenizer.json").read_text("utf-8"))["added_tokens"]
SPECIAL = [token["content"] for token in ADDED if token["special"]]
INSIDE = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in SPECIAL if token[1:])


def plain(text):  # a special token that the text spells stays text: it is cut there
    return [id_ for part in re.split(INSIDE or "(?!)", text) for id_ in tokenizer.encode(part).tolist()]


"""


def encode_code(task: TaskRecord | None, tokenizer: ModelTokenizer) -> str:
    """The definition of `encode(**fields)`, which gives token ids, and of what it calls."""
    if task is None:
        return f"{_PLAIN}def encode(input):\n    return plain(input)\n"
    opening = [bos_id(task, tokenizer)] if task.bos == "after" else []
    closing = separator_ids(task, tokenizer)
    if is_chat(task):
        ids = f"tokenizer.encode(rendered.removeprefix({tokenizer.bos or ''!r}))"
        return f"def encode(rendered):  # see below\n    return {_listed(opening, [f'*{ids}'], closing)}\n"
    pieces = [piece if isinstance(piece, int) else _formatted(piece) for piece in template_pieces(task, tokenizer)]
    room = max(0, task.max_length - len(opening) - len(closing))
    body = f"    ids = {_listed(pieces)}\n    return {_listed(opening, [f'*ids[:{room}]'], closing)}\n"
    return f"{_PLAIN}def encode(**fields):  # as the prefix was trained, which saw {task.max_length} tokens\n{body}"


def template_pieces(task: TaskRecord, tokenizer: ModelTokenizer) -> list[int | str]:
    """The input template as the ids of the special tokens that it spells, and the templates between them."""
    names = {name: name for name in input_fields(task)}
    spelled = sorted(tokenizer.special_ids, key=len, reverse=True)
    pattern = f"({'|'.join(map(re.escape, spelled)) or '(?!)'})"
    pieces: list[int | str] = []
    for part, literal in fill(task.input_template, names, "task"):
        for text in re.split(pattern, part) if literal else [part]:
            if literal and text in tokenizer.special_ids:
                pieces.append(tokenizer.special_ids[text])
                continue
            template = escape(text) if literal else f"{{{text}}}"
            if pieces and isinstance(pieces[-1], str):
                template = str(pieces.pop()) + template
            pieces += [template] if template else []
    return pieces


def examples(task: TaskRecord | None, tokenizer: ModelTokenizer) -> tuple[dict[str, str], dict[str, str]]:
    """The fields of two inputs, to be tried."""
    if task is not None and is_chat(task):
        said = ([{"role": "user", "content": text}] for text in ("a text", "and another one"))
        one, other = ({"rendered": render_chat(tokenizer, messages)} for messages in said)
        return one, other
    names = ("input",) if task is None else input_fields(task)
    return dict.fromkeys(names, "a text"), dict.fromkeys(names, "and another one")


def _formatted(template: str) -> str:
    return f"*plain({template!r}.format(**fields))"


def _listed(*parts: list[int | str] | list[int] | list[str]) -> str:
    return f"[{', '.join(str(item) for part in parts for item in part)}]"
