"""Ready-made tasks, and tasks of one's own as TOML files with the same keys.

    input_template = "{question} "     fields in braces; {bos} and {eos} stand for the tokenizer's own strings
    separator = "{eos}"                closes the prompt; survives truncation
    target_template = " {target} "
    stop = ["{eos}"]                   the first is taught, each ends generation
    bos = "none"                       "none", "before" (the prefix holds it) or "after" (one is put behind it)
    max_length = 128                   tokens of prompt and target together
    [verbalizer]                       for a task that chooses one of several labels: the word for each,
    positive = "great"                 which is its target; at least two, all different
    negative = "terrible"

or, for a task that a trained head answers:

    answer = "label"                   or "tags", one for each of the words {tokens}; "choice" of what is put into
                                       {choice}; "span", which is a part of the last field
    labels = ["negative", "positive"]  in the order of the head's outputs; by default the labels in the data

What a file leaves out is as in the task `text`, except `bos`: it follows the tokenizer, which knows whether its model
expects one.

An encoder-decoder reads input and separator with its encoder and writes the target with its decoder. For it the
separator of `text` is `{eos}`, with which T5's and BART's sources end, and where the tokenizer puts a BOS before a text
the target begins with one too: `<s> source </s>` and `<s> target </s>`, as the code of Prefix-Tuning has it for BART.

For an encoder `{cls}`, `{sep}` and `{mask}` stand for its special tokens, and nothing is put there that a template does
not spell. The word that a `[verbalizer]` has for a label is one token there, at the `{mask}` of the template.
Where a vocabulary keeps a word's space with the word, as RoBERTa's does, write `{text}{mask}` without a space and
`target_template = " {target}"`.

`{slot}` in input_template or separator is no field but a place for a vector of the prompt: P-Tuning's
`"{cls}{slot}{slot}{mask}{slot}{text}{sep}"`. Prefix-Tuning on a decoder puts a key and a value of every layer there:
with `separator = "{slot}{slot}{eos}"` Li and Liang's infix between input and target. Its separator ends in something
else than a slot, from which the target goes on. There are as many vectors, or keys and values, as slots.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Answer, Bos, TaskRecord
from prefixkit.spelling import did_you_mean
from prefixkit.task.chat import chat_template_hash, render_chat, turn_end
from prefixkit.task.encode import check_task, input_fields
from prefixkit.task.located import check_answer_fields
from prefixkit.task.template import escape
from prefixkit.task.tokenizer import ModelTokenizer

TEMPLATES: Mapping[str, Mapping[str, Any]] = {
    "text": {
        "input_template": "{input}",
        "separator": "\n",
        "target_template": "{target}",
        "stop": ["{eos}"],
    },
    # The target goes on where the input ends; a text that both continue is in the prefix, with its BOS.
    "continuation": {
        "bos": "before",
        "input_template": "{input}",
        "separator": "",
        "target_template": "{target}",
        "stop": ["{eos}"],
    },
    # As the code of Prefix-Tuning (Li and Liang, 2021) writes it for GPT-2, where the separator, named BOS, is EOS.
    "e2e": {
        "input_template": " {input} ",
        "separator": "{eos}",
        "target_template": " {target} ",
        "stop": ["{eos}"],
    },
}
HEADS: Mapping[str, Mapping[str, Any]] = {
    "classification": {"answer": "label", "input_template": "{text}"},
    "pair-classification": {"answer": "label", "input_template": "{text_a}{sep}{text_b}"},
    "tagging": {"answer": "tags", "input_template": "{tokens}"},
    "multiple-choice": {"answer": "choice", "input_template": "{text}{sep}{choice}"},
    "question-answering": {"answer": "span", "input_template": "{question}{sep}{context}"},
}
"""Tasks that a head answers. Between two texts stand as many separators as the tokenizer's own post-processor puts
there (RoBERTa's two), and on decoders the end of a line."""
READY_MADE = (*TEMPLATES, *HEADS, "chat")
_OURS = ("chat_template_hash", "filler_id", "image")
KEYS = tuple(field.name for field in fields(TaskRecord) if field.name not in _OURS)


def load_task(
    name_or_path: str | Path, tokenizer: ModelTokenizer, *, max_length: int, kind: str = "decoder"
) -> TaskRecord:
    """The ready-made task of that name, or the task that a TOML file describes, for this tokenizer.

    `max_length` is the number of tokens that the backbone has for prompt and target; a file may ask for fewer.
    `kind` is that of the backbone, as `prefixkit methods` names it. Raises ConfigError.
    """
    name = str(name_or_path)
    text = {**TEMPLATES["text"], **_usual(kind, tokenizer)}
    templates = {**TEMPLATES, **{task: _answered(kind, head, tokenizer) for task, head in HEADS.items()}, "text": text}
    if name == "chat":
        return _chat(tokenizer, max_length)
    if name in templates:
        return _task(name, {"name": name}, templates[name], tokenizer, max_length)
    if name.endswith(".toml"):
        settings = _read(Path(name))
        return _task(name, settings, {**text, **(_silent(kind) if "answer" in settings else {})}, tokenizer, max_length)
    raise ConfigError(
        "--task",
        expected="a ready-made task or a .toml file",
        found=repr(name),
        next_step=did_you_mean(name, READY_MADE),
    )


def _usual(kind: str, tokenizer: ModelTokenizer) -> dict[str, Any]:
    """What the task `text` is on a backbone of this kind, where it is not what it is on a decoder."""
    if kind == "encoder-decoder":
        return {"separator": "{eos}", "target_template": "{bos}{target}" if tokenizer.adds_bos else "{target}"}
    return _silent(kind) if kind == "encoder" else {}


def _silent(kind: str) -> dict[str, Any]:
    """What a task is that writes nothing: no stop token, and on encoders no special token but those that it spells."""
    if kind == "encoder":
        return {"separator": "{sep}", "target_template": "{target}", "stop": [], "bos": "none"}
    return {"separator": "", "target_template": "{target}", "stop": []}


def _answered(kind: str, head: Mapping[str, Any], tokenizer: ModelTokenizer) -> dict[str, Any]:
    opening, between = ("{cls}", "{sep}" * tokenizer.separators) if kind == "encoder" else ("", "\n")
    return {**_silent(kind), **head, "input_template": opening + head["input_template"].replace("{sep}", between)}


def _chat(tokenizer: ModelTokenizer, max_length: int) -> TaskRecord:
    opening = render_chat(tokenizer, [{"role": "user", "content": "a"}])
    end = turn_end(tokenizer)
    task = TaskRecord(
        name="chat",
        input_template="{messages}",
        separator="",
        target_template="{target}",
        bos="after" if tokenizer.bos and opening.startswith(tokenizer.bos) else "none",
        stop=tuple(dict.fromkeys([*([end] if end else []), *tokenizer.stop])),
        max_length=max_length,
        chat_template_hash=chat_template_hash(tokenizer.chat_template or ""),
    )
    check_task(task, tokenizer)
    return task


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(path, expected="a task file", found="no such file", next_step="check the path") from error
    except (OSError, ValueError) as error:
        step = 'write lines such as separator = " => ", in UTF-8'
        raise ConfigError(path, expected="a TOML file", found=str(error), next_step=step) from error
    for key in settings:
        if key not in KEYS:
            raise ConfigError(path, expected="the keys of a task", found=repr(key), next_step=did_you_mean(key, KEYS))
    return {"name": path.stem, **settings}


def _task(
    where: str, settings: Mapping[str, Any], missing: Mapping[str, Any], tokenizer: ModelTokenizer, limit: int
) -> TaskRecord:
    bos = missing.get("bos", "after") if tokenizer.adds_bos else "none"
    given = {**missing, "bos": bos, "max_length": limit, **settings}
    _check_types(where, given, limit, writes=bool(missing["stop"]))
    task = TaskRecord(
        name=given["name"],
        input_template=_resolve(given["input_template"], tokenizer, escape),
        separator=_resolve(given["separator"], tokenizer),
        target_template=_resolve(given["target_template"], tokenizer, escape),
        bos=given["bos"],
        stop=tuple(_resolve(token, tokenizer) for token in given["stop"]),
        max_length=given["max_length"],
        labels=tuple(given.get("labels") or given.get("verbalizer") or ()) or None,
        verbalizer=given.get("verbalizer"),
        answer=given.get("answer"),
    )
    check_task(task, tokenizer)
    check_answer_fields(task, where)
    if not input_fields(task):
        found, step = repr(task.input_template), "write a field in braces, such as {input}"
        raise ConfigError(where, expected="input_template with a field", found=found, next_step=step)
    return task


def _check_types(where: str, given: Mapping[str, Any], limit: int, *, writes: bool) -> None:
    for key in ("name", "input_template", "separator", "target_template"):
        if not isinstance(given[key], str):
            raise ConfigError(where, expected=f"{key} = a string", found=repr(given[key]))
    if given["bos"] not in get_args(Bos):
        raise ConfigError(where, expected='bos = "none", "before" or "after"', found=repr(given["bos"]))
    if not isinstance(given["stop"], list) or not all(isinstance(token, str) for token in given["stop"]):
        raise ConfigError(where, expected="stop = a list of strings", found=repr(given["stop"]))
    if writes and not given["stop"]:
        step = 'write stop = ["{eos}"]: without one no answer ends'
        raise ConfigError(where, expected="at least one stop token", found="stop = []", next_step=step)
    _check_verbalizer(where, given.get("verbalizer"))
    _check_answer(where, given)
    if type(given["max_length"]) is not int or not 1 <= given["max_length"] <= limit:
        raise ConfigError(where, expected=f"max_length from 1 to {limit}", found=repr(given["max_length"]))


def _check_verbalizer(where: str, words: Any) -> None:
    if words is None:
        return
    if not isinstance(words, dict) or not all(isinstance(word, str) and word.strip() for word in words.values()):
        raise ConfigError(where, expected="[verbalizer] with a word for each label", found=repr(words))
    if len(words) < 2 or len(set(words.values())) < len(words):
        found = ", ".join(f"{label} = {word!r}" for label, word in words.items()) or "none"
        raise ConfigError(where, expected="[verbalizer] with two different words at least", found=found)


def _check_answer(where: str, given: Mapping[str, Any]) -> None:
    answer, labels = given.get("answer"), given.get("labels")
    if answer is not None and answer not in get_args(Answer):
        raise ConfigError(where, expected=f"answer = {' or '.join(get_args(Answer))}", found=repr(answer))
    if answer is not None and "verbalizer" in given:
        raise ConfigError(where, expected="a head's answer or a verbalizer", found="both")
    if labels is None:
        return
    if answer not in ("label", "tags"):
        raise ConfigError(where, expected='answer = "label" or "tags" beside labels', found=repr(answer))
    texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not texts or len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(where, expected="labels = a list of two different ones at least", found=repr(labels))


def _resolve(text: str, tokenizer: ModelTokenizer, written: Any = str) -> str:
    special = {f"{{{name}}}": tokenizer.special_tokens.get(f"{name}_token") for name in ("cls", "sep", "mask")}
    for name, token in {"{eos}": tokenizer.eos, "{bos}": tokenizer.bos, **special}.items():
        if name not in text:
            continue
        if token is None:
            raise ConfigError(
                tokenizer.folder,
                expected=f"a token for {name}",
                found="none",
                next_step="write separator and stop yourself in a task file",
            )
        text = text.replace(name, written(token))
    return text
