"""`POST /v1/completions`: texts, or token ids, that are continued as the prefix's task has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prefixkit.serving.generation import Completion
from prefixkit.serving.http.asked import MOST_ALTERNATIVES, read_asked
from prefixkit.serving.http.body import read_object
from prefixkit.serving.http.errors import ApiError
from prefixkit.serving.http.parameters import Parameters
from prefixkit.serving.http.replies import Reply
from prefixkit.serving.http.service import service_of
from prefixkit.serving.request import Progress, TokenScore

Prompt = str | tuple[int, ...]


async def complete(request: Request) -> Response:
    """Answer a request for completions, one choice for each prompt."""
    service = service_of(request)
    given = Parameters(await read_object(request, service.limits.body))
    model = service.catalogue.find(given.text("model"))
    prompts = _prompts(given, service.limits.prompts, service.session.report.backbone.vocab_size)
    given.only("best_of", 1)
    given.only("echo", False)
    given.only("suffix")
    asked = read_asked(given, model, tokens=["max_tokens"], logprobs=given.integer("logprobs", 0, MOST_ALTERNATIVES))
    given.finish()
    return await Reply(service, _TextForm(len(prompts)), asked).respond(request, asked.requests(prompts))


def _prompts(given: Parameters, most: int, vocabulary: int) -> list[Prompt]:
    value = given.value("prompt")
    several = isinstance(value, list) and bool(value) and not all(type(one) is int for one in value)
    listed = value if several else [value]
    if len(listed) > most:
        raise ApiError(400, f"prompt: expected at most {most}; found {len(listed)}", param="prompt")
    return [_prompt(given, one, vocabulary) for one in listed]


def _prompt(given: Parameters, value: Any, vocabulary: int) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(one) is int and 0 <= one < vocabulary for one in value):
        return tuple(value)
    raise given.wrong("prompt", f"a string, token ids below {vocabulary}, or a list of either", value)


class _TextForm:
    """Completions as OpenAI words them."""

    identifier, prompt, whole, chunk = "cmpl", "prompt", "text_completion", "text_completion"

    def __init__(self, count: int) -> None:
        self._offsets = [0] * count

    def choice(self, index: int, completion: Completion, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        return self._worded(index, completion.text, completion, scores)

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, progress: Progress, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        return self._worded(index, progress.text, progress.completion, scores)

    def _worded(
        self, index: int, text: str, completion: Completion | None, scores: Sequence[TokenScore] | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if scores is None else self._logprobs(index, scores),
            "finish_reason": None if completion is None else completion.finish,
        }

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        # Offsets into the tokens' texts put together: a choice's text is without the white space at its ends.
        *offsets, self._offsets[index] = accumulate((len(one.text) for one in scores), initial=self._offsets[index])
        return {
            "tokens": [one.text for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [{text: logprob for _, text, logprob in one.top} for one in scores],
            "text_offset": offsets,
        }
