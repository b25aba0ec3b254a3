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

What a file leaves out is as in the task `text`, except `bos`: it follows the tokenizer, which knows whether its model
expects one.

An encoder-decoder reads input and separator with its encoder and writes the target with its decoder. For it the
separator of `text` is `{eos}`, with which T5's and BART's sources end, and where the tokenizer puts a BOS before a text
the target begins with one too: `<s> source </s>` and `<s> target </s>`, as the code of Prefix-Tuning has it for BART.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Bos, TaskRecord
from prefixkit.spelling import did_you_mean
from prefixkit.task.chat import chat_template_hash, render_chat, turn_end
from prefixkit.task.encode import check_task, input_fields
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
READY_MADE = (*TEMPLATES, "chat")
KEYS = ("name", "input_template", "separator", "target_template", "stop", "bos", "max_length", "verbalizer")


def load_task(
    name_or_path: str | Path, tokenizer: ModelTokenizer, *, max_length: int, paired: bool = False
) -> TaskRecord:
    """The ready-made task of that name, or the task that a TOML file describes, for this tokenizer.

    `max_length` is the number of tokens that the backbone has for prompt and target; a file may ask for fewer. `paired`
    says that it reads them apart, as encoder-decoders do. Raises ConfigError.
    """
    name = str(name_or_path)
    templates = {**TEMPLATES, "text": {**TEMPLATES["text"], **(_pair(tokenizer) if paired else {})}}
    if name == "chat":
        return _chat(tokenizer, max_length)
    if name in templates:
        return _task(name, {"name": name}, templates[name], tokenizer, max_length)
    if name.endswith(".toml"):
        return _task(name, _read(Path(name)), templates["text"], tokenizer, max_length)
    raise ConfigError(
        "--task",
        expected="a ready-made task or a .toml file",
        found=repr(name),
        next_step=did_you_mean(name, READY_MADE),
    )


def _pair(tokenizer: ModelTokenizer) -> dict[str, str]:
    return {"separator": "{eos}", "target_template": "{bos}{target}" if tokenizer.adds_bos else "{target}"}


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
    _check_types(where, given, limit)
    task = TaskRecord(
        name=given["name"],
        input_template=_resolve(given["input_template"], tokenizer, escape),
        separator=_resolve(given["separator"], tokenizer),
        target_template=_resolve(given["target_template"], tokenizer, escape),
        bos=given["bos"],
        stop=tuple(_resolve(token, tokenizer) for token in given["stop"]),
        max_length=given["max_length"],
        labels=tuple(given["verbalizer"]) if "verbalizer" in given else None,
        verbalizer=given.get("verbalizer"),
    )
    check_task(task, tokenizer)
    if not input_fields(task):
        found, step = repr(task.input_template), "write a field in braces, such as {input}"
        raise ConfigError(where, expected="input_template with a field", found=found, next_step=step)
    return task


def _check_types(where: str, given: Mapping[str, Any], limit: int) -> None:
    for key in ("name", "input_template", "separator", "target_template"):
        if not isinstance(given[key], str):
            raise ConfigError(where, expected=f"{key} = a string", found=repr(given[key]))
    if given["bos"] not in get_args(Bos):
        raise ConfigError(where, expected='bos = "none", "before" or "after"', found=repr(given["bos"]))
    if not isinstance(given["stop"], list) or not all(isinstance(token, str) for token in given["stop"]):
        raise ConfigError(where, expected="stop = a list of strings", found=repr(given["stop"]))
    if not given["stop"]:
        step = 'write stop = ["{eos}"]: without one no answer ends'
        raise ConfigError(where, expected="at least one stop token", found="stop = []", next_step=step)
    _check_verbalizer(where, given.get("verbalizer"))
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


def _resolve(text: str, tokenizer: ModelTokenizer, written: Any = str) -> str:
    for name, token in (("{eos}", tokenizer.eos), ("{bos}", tokenizer.bos)):
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
