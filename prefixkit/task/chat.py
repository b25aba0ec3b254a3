"""Conversations through the tokenizer's own chat template, rendered as transformers renders them.

A chat template emits special tokens as text, so they are recognised wherever they stand in its output: a user who
types `<|im_end|>` into a message ends the turn. Nothing can escape that here; check untrusted messages before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from blake3 import blake3

from prefixkit.errors import ConfigError, DataError
from prefixkit.task.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]


def chat_template_hash(template: str) -> str:
    """The tagged BLAKE3 of a chat template's UTF-8 bytes."""
    return "b3-v1:" + blake3(template.encode()).hexdigest()


def render_chat(
    tokenizer: ModelTokenizer, messages: Sequence[Message], *, reply: bool = True, where: str = "messages"
) -> str:
    """The conversation as text, with the opening of the assistant's turn at the end where `reply` is True.

    Raises ConfigError without a chat template or jinja2, DataError when the template refuses the messages.
    """
    template = _compiled(tokenizer)
    try:
        return template.render(messages=messages, add_generation_prompt=reply, **tokenizer.special_tokens)
    except Exception as error:  # a template is a program: what it trips over is not ours to list
        raise DataError(where, expected="messages that the chat template accepts", found=str(error)) from error


def turn_end(tokenizer: ModelTokenizer) -> str | None:
    """The special token that the template puts behind an assistant's reply, such as `<|im_end|>`, if it puts one."""
    probe = "prefixkit probe"
    rendered = render_chat(
        tokenizer,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}],
        reply=False,
    )
    after = rendered.rpartition(probe)[2].lstrip()
    ends = [token for token in tokenizer.special_ids if after.startswith(token)]
    return max(ends, key=len, default=None)


def _compiled(tokenizer: ModelTokenizer) -> Template:
    if tokenizer.chat_template is None:
        raise ConfigError(
            tokenizer.folder, expected="a chat template", found="none", next_step="choose another task than 'chat'"
        )
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError("chat template", expected="jinja2", found="none", next_step="pip install jinja2") from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(tokenizer.chat_template)
    except TemplateError as error:
        raise ConfigError(tokenizer.folder, expected="a valid chat template", found=str(error)) from error


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
