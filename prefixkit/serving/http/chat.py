"""`POST /v1/chat/completions`: conversations, for prefixes whose task goes through a chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefixkit.errors import InputError
from prefixkit.format.manifest import TaskRecord
from prefixkit.serving.generation import Completion
from prefixkit.serving.http.asked import MOST_ALTERNATIVES, read_asked
from prefixkit.serving.http.body import read_object
from prefixkit.serving.http.catalogue import Model
from prefixkit.serving.http.errors import ApiError, wrong
from prefixkit.serving.http.parameters import Parameters
from prefixkit.serving.http.replies import Reply
from prefixkit.serving.http.service import Service, service_of
from prefixkit.serving.prompts import encode
from prefixkit.serving.request import Progress, TokenScore
from prefixkit.task import Fields

_BROKEN = "\ufffd"


async def chat(request: Request) -> Response:
    """Answer a request for the next message of a conversation."""
    service = service_of(request)
    given = Parameters(await read_object(request, service.limits.body))
    model = service.catalogue.find(given.text("model"))
    conversation = _conversation(model)
    messages = _messages(given)
    _refuse_tools(given)
    asked = read_asked(given, model, tokens=["max_completion_tokens", "max_tokens"], logprobs=_logprobs(given))
    given.finish()
    fields: Fields = {"messages": messages}
    prompt: Fields | tuple[int, ...] = fields
    if model.task is None:
        # The engine takes a text for a model without a task as it stands: it is given the ids, and what ends a turn.
        prompt = await _ids(service, conversation, fields)
        asked = replace(asked, stop=(*asked.stop, *conversation.stop))
    return await Reply(service, _ChatForm(), asked).respond(request, asked.requests([prompt]))


async def _ids(service: Service, conversation: TaskRecord, fields: Fields) -> tuple[int, ...]:
    """The token ids of a conversation, made beside the event loop, as it may be long."""
    known = conversation, service.session.tokenizer, fields, "messages", service.capacity
    try:
        return tuple((await asyncio.to_thread(encode, *known))[0])
    except InputError as error:
        raise wrong("messages", error) from error


def _conversation(model: Model) -> TaskRecord:
    if model.conversation is None:
        how = f"has the task {model.task.name!r}" if model.task is not None else "continues text"
        message = f"the model {model.name!r} {how}, without a chat template; use /v1/completions"
        raise ApiError(400, message, param="model", code="no_chat_template")
    return model.conversation


def _messages(given: Parameters) -> list[dict[str, str]]:
    value = given.value("messages")
    if not isinstance(value, list) or not value:
        raise given.wrong("messages", "a list of messages", value)
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ApiError(400, f"{where}: expected an object with role and content", param=where)
    given = Parameters(value, within=f"{where}.")
    given.value("name")
    message = {"role": given.text("role"), "content": _content(given)}
    given.finish()
    return message


def _content(given: Parameters) -> str:
    """Text, or parts of text put together."""
    value = given.value("content")
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise given.wrong("content", "text, or parts of the type text", value)
    return "".join(str(text) for text in texts)


def _refuse_tools(given: Parameters) -> None:
    given.only("tools", [])
    given.only("tool_choice", "none", "auto")
    given.only("response_format", {"type": "text"})
    given.only("modalities", ["text"])


def _logprobs(given: Parameters) -> int | None:
    wanted, top = given.flag("logprobs"), given.integer("top_logprobs", 0, MOST_ALTERNATIVES)
    if top is not None and not wanted:
        raise given.wrong("top_logprobs", "nothing without logprobs", top)
    return (top or 0) if wanted else None


class _ChatForm:
    """Messages as OpenAI words them."""

    identifier, prompt, whole, chunk = "chatcmpl", "messages", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, completion: Completion, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"index": index, "message": message, **_ending(completion, scores)}

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, **_ending(None, None)}

    def piece(self, index: int, progress: Progress, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        delta = {"content": progress.text} if progress.text else {}
        return {"index": index, "delta": delta, **_ending(progress.completion, scores)}


def _ending(completion: Completion | None, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
    return {
        "logprobs": None if scores is None else {"content": [_scored(one) for one in scores], "refusal": None},
        "finish_reason": None if completion is None else completion.finish,
    }


def _scored(score: TokenScore) -> dict[str, Any]:
    top = [_token(text, logprob) for _, text, logprob in score.top]
    return {**_token(score.text, score.logprob), "top_logprobs": top}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # The bytes of a token that is a part of a character are not known by its text.
    return {"token": text, "logprob": logprob, "bytes": None if _BROKEN in text else list(text.encode())}
