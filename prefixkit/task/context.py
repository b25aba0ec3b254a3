"""A text that stands before every prompt of a task, as the token ids that a prefix captures."""

from __future__ import annotations

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task.chat import render_chat
from prefixkit.task.encode import bos_id, is_chat
from prefixkit.task.template import encodable
from prefixkit.task.tokenizer import ModelTokenizer


def encode_context(task: TaskRecord, tokenizer: ModelTokenizer, text: str, *, where: str = "context") -> list[int]:
    """The ids of `text`, behind the BOS that `task` promises a prompt; a chat task takes it as the system message.

    The prompt that follows is tokenised on its own: no token reaches across the boundary.

    Raises:
        ConfigError: the task wants a BOS that the tokenizer does not have, or the chat template does not write a
            system message simply before the conversation.
        DataError: half a surrogate pair, or a text that the chat template refuses.
    """
    head = [] if task.bos == "none" else [bos_id(task, tokenizer)]
    if is_chat(task):
        return head + _system_turn(tokenizer, encodable(text, where), where)
    return head + tokenizer.encode_text(encodable(text, where))


def _system_turn(tokenizer: ModelTokenizer, text: str, where: str) -> list[int]:
    """What a conversation begins with for having `text` as its system message.

    Some templates write a system message of their own where there is none, or put it into the user's turn: then no
    beginning makes the one conversation of the other.
    """
    asked = {"role": "user", "content": "a"}
    without = _rendered(tokenizer, [asked], where)
    whole = _rendered(tokenizer, [{"role": "system", "content": text}, asked], where)
    if len(whole) <= len(without) or whole[-len(without) :] != without:
        raise ConfigError(
            where,
            expected="a chat template that writes a system message before the conversation and changes nothing else",
            found="another",
            next_step="send the system message with each conversation, or choose another --task",
        )
    return whole[: -len(without)]


def _rendered(tokenizer: ModelTokenizer, messages: list[dict[str, str]], where: str) -> list[int]:
    rendered = render_chat(tokenizer, messages, where=where)
    return tokenizer.encode_rendered(rendered.removeprefix(tokenizer.bos or ""))
