"""What a request asks for, beside its prompts: the parameters that completions and chats share."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefixkit.serving.http.catalogue import Model
from prefixkit.serving.http.parameters import Parameters
from prefixkit.serving.request import Request
from prefixkit.serving.sampling import PENALTIES, Sampling
from prefixkit.task import Fields

MOST_ALTERNATIVES = 20
"""Log-probabilities a token."""
_MOST_STOPS = 16
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How to answer.

    Attributes:
        limit: what the request calls `max_new_tokens`.
        stream: answer by server-sent events.
        usage: tell the tokens at the end of a stream.
        logprobs: alternatives a token, 0 for the token alone; None without log-probabilities.
    """

    model: Model
    max_new_tokens: int | None
    limit: str
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: int | None

    def requests(self, prompts: Sequence[str | Fields | tuple[int, ...]]) -> list[Request]:
        """One request to the engine for each prompt; equal prompts get answers of their own."""
        return [
            Request(
                prompt=prompt,
                prefix=self.model.prefix,
                max_new_tokens=self.max_new_tokens,
                sampling=replace(self.sampling, seed=self.sampling.seed + index),
                stop=self.stop,
                logprobs=self.logprobs,
            )
            for index, prompt in enumerate(prompts)
        ]


def read_asked(given: Parameters, model: Model, *, tokens: Sequence[str], logprobs: int | None) -> Asked:
    """Read the shared parameters, the limit on new tokens under one of the names `tokens`.

    Raises:
        ApiError: 400 for a value out of range, or one that asks for what there is not.
    """
    _refuse_unsupported(given)
    stream, options = given.flag("stream"), given.nested("stream_options")
    if options.value("include_usage") is not None and not stream:
        raise given.wrong("stream_options", "nothing without stream", given.value("stream_options"))
    usage = options.flag("include_usage")
    options.only("include_obfuscation", False)
    options.finish()
    limits = {name: given.integer(name, 1, _MOST_TOKENS) for name in tokens}
    limit = next((name for name, most in limits.items() if most is not None), tokens[0])
    return Asked(
        model=model,
        max_new_tokens=limits[limit],
        limit=limit,
        sampling=_sampling(given),
        stop=given.texts("stop", _MOST_STOPS),
        stream=stream,
        usage=usage,
        logprobs=logprobs,
    )


def _sampling(given: Parameters) -> Sampling:
    """As OpenAI has it, the temperature is 1 and every answer another, unless told otherwise."""
    temperature = given.number("temperature", 0)
    top_k, top_p = given.integer("top_k", 1, _MOST_TOKENS), given.number("top_p", 0, 1)
    min_p, penalty = given.number("min_p", 0, 1), given.number("repetition_penalty", *PENALTIES)
    seed = given.integer("seed", -(2**63), 2**63 - 1)
    if top_p == 0:
        raise given.wrong("top_p", "a number above 0", 0)
    if temperature == 0:
        # The likeliest token is among those that any of these leaves.
        top_k = top_p = min_p = None
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=1.0 if penalty is None else penalty,
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
    )


def _refuse_unsupported(given: Parameters) -> None:
    given.only("n", 1)
    given.only("logit_bias", {})
    for name in ("presence_penalty", "frequency_penalty"):
        given.only(name, 0, 0.0)
