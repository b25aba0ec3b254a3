"""Long texts become tokens in a thread of their own: what is being written goes on, and so does the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from prefixkit.serving.http.service import Service
from prefixkit.serving.request import Request

LONG = 8192
"""Characters of a request, all its prompts together, that take the engine's thread less than a step."""
_MESSAGE = 16
"""Characters that a chat template is taken to put around a message."""


async def tokenised(service: Service, requests: Sequence[Request]) -> Sequence[Request]:
    """`requests`, their prompts as the model reads them where they are long.

    Raises:
        InputError: as `Session.prompt` does; a text that cannot fit is refused before it is tokenised.
    """
    if sum(map(_size, requests)) < LONG:
        return requests
    return await asyncio.to_thread(lambda: [_tokenised(service, request) for request in requests])


def _tokenised(service: Service, request: Request) -> Request:
    prompt = service.session.prompt(
        request.prompt, request.prefix, "prompt", request.max_new_tokens, most=service.capacity
    )
    return replace(request, prompt=prompt)


def _size(request: Request) -> int:
    if isinstance(request.prompt, str):
        return len(request.prompt)
    conversation = request.prompt.get("messages", ()) if isinstance(request.prompt, dict) else ()
    return sum(_MESSAGE + sum(map(len, message.values())) for message in conversation)
