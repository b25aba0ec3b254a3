"""Answering a request: whole, or as server-sent events while it is being written."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from prefixkit.errors import InputError
from prefixkit.serving.delivery import Answers
from prefixkit.serving.generation import Completion
from prefixkit.serving.http.asked import Asked
from prefixkit.serving.http.errors import CLIENT_GONE, ApiError, told, wrong
from prefixkit.serving.http.long_texts import tokenised
from prefixkit.serving.http.metrics import Stopwatch
from prefixkit.serving.http.service import Service
from prefixkit.serving.prompts import NEW_TOKENS
from prefixkit.serving.request import Progress, Request, TokenScore


@dataclass
class Written:
    """What there is of one answer."""

    completion: Completion | None = None
    scores: list[TokenScore] = field(default_factory=list)

    def take(self, progress: Progress) -> None:
        self.completion = progress.completion
        self.scores += progress.scores


class Form(Protocol):
    """How a route words its answers."""

    identifier: str
    """What its ids begin with."""
    prompt: str
    """The parameter that holds what is continued."""
    whole: str
    """The `object` of a whole answer, and of a chunk of it."""
    chunk: str

    def choice(self, index: int, completion: Completion, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        """A choice of a whole answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice of a chunk before anything is written."""

    def piece(self, index: int, progress: Progress, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        """A choice of a chunk."""


class Reply:
    """The response to one request of the engine's answers."""

    def __init__(self, service: Service, form: Form, asked: Asked) -> None:
        self._service, self._form, self._asked = service, form, asked
        self._watch = Stopwatch(service.metrics)
        self._deadline = None
        if service.limits.seconds is not None:
            self._deadline = asyncio.get_running_loop().time() + service.limits.seconds
        self._head = {"id": f"{form.identifier}-{secrets.token_hex(12)}", "created": int(time.time())}

    async def respond(self, http: HttpRequest, requests: Sequence[Request]) -> Response:
        """Submit `requests` and answer.

        Raises:
            InputError, EngineError: as `Worker.submit` does.
            ApiError: the client has gone. TimeoutError: it took too long.
        """
        answers = await self._submit(requests)
        if self._asked.stream:
            return _EventStream(self._events(answers, len(requests)), lambda: self._close(answers))
        try:
            return _json(await self._whole(http, answers, len(requests)))
        finally:
            self._close(answers)

    async def _submit(self, requests: Sequence[Request]) -> Answers:
        try:
            return await self._service.worker.submit(await tokenised(self._service, requests), self._watch.see)
        except InputError as error:
            # What the engine calls so, as this client called it.
            named = {NEW_TOKENS: self._asked.limit, "prompt": self._form.prompt}.get(error.where)
            if named is None:
                raise
            raise wrong(named, error) from error

    def _close(self, answers: Answers) -> None:
        answers.close()
        self._watch.stop()

    async def _whole(self, http: HttpRequest, answers: Answers, count: int) -> dict[str, Any]:
        collecting = asyncio.ensure_future(self._collect(answers, count))
        leaving = asyncio.ensure_future(_disconnected(http))
        try:
            async with asyncio.timeout_at(self._deadline):
                await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            collecting.cancel()
        if not collecting.done():
            raise ApiError(CLIENT_GONE, "the client hung up")
        written = collecting.result()
        choices = [self._form.choice(index, one, self._scores(scores)) for index, (one, scores) in enumerate(written)]
        usage = _usage([completion for completion, _ in written])
        return self._document(self._form.whole, choices) | {"usage": usage}

    async def _collect(self, answers: Answers, count: int) -> list[tuple[Completion, list[TokenScore]]]:
        written = [Written() for _ in range(count)]
        async for index, progress in answers:
            written[index].take(progress)
        return [(one.completion, one.scores) for one in written if one.completion is not None]

    async def _events(self, answers: Answers, count: int) -> AsyncIterator[bytes]:
        try:
            completions: list[Completion] = []
            openings = [choice for choice in map(self._form.opening, range(count)) if choice is not None]
            for choice in openings:
                yield self._chunk([choice])
            # The deadline is for the engine: a client may read as slowly as it likes.
            while (arrived := await self._next(answers)) is not None:
                index, progress = arrived
                completions += [progress.completion] if progress.completion is not None else []
                if progress.text or progress.scores or progress.completion is not None:
                    yield self._chunk([self._form.piece(index, progress, self._scores(progress.scores))])
            if self._asked.usage:
                yield self._chunk([], _usage(completions))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield _event(told(error).document)

    async def _next(self, answers: Answers) -> tuple[int, Progress] | None:
        async with asyncio.timeout_at(self._deadline):
            return await anext(answers, None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        document = self._document(self._form.chunk, choices)
        return _event(document | {"usage": usage} if self._asked.usage else document)

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "model": self._asked.model.name, "choices": choices}

    def _scores(self, scores: Sequence[TokenScore]) -> Sequence[TokenScore] | None:
        return scores if self._asked.logprobs is not None else None


class _EventStream(StreamingResponse):
    """Server-sent events, after which `closing` is called even where not one was asked for."""

    def __init__(self, events: AsyncIterator[bytes], closing: Callable[[], None]) -> None:
        # Proxies such as nginx would collect the pieces.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closing()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    asked = sum(completion.prompt_tokens for completion in completions)
    written = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def _json(document: dict[str, Any]) -> Response:
    return Response(_encoded(document), media_type="application/json")


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {_encoded(document)}\n\n".encode()


def _encoded(document: dict[str, Any]) -> str:
    """As JSON, which knows no NaN and no infinity. Raises ApiError 500 for log-probabilities that are such."""
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        message = "the model gave log-probabilities that are no finite numbers; ask without them"
        raise ApiError(500, message, param="logprobs", code="not_finite", kind="server_error") from error
