"""What is asked of an engine, and what it answers, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

from prefixkit.errors import ConfigError, InputError
from prefixkit.serving.generation import Completion, Prompt
from prefixkit.serving.sampling import GREEDY, Sampling
from prefixkit.task import Fields


class BusyError(InputError):
    """As many requests wait as may."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to write.

    Attributes:
        prompt: the input of the prefix's task, its text or its fields by name; or token ids, which are taken as they
            are; or what `Session.prompt` made of either.
        prefix: the name of a prefix; None is the bare model.
        max_new_tokens: at most; None is 128, or fewer where the context or the capacity ends.
        sampling: how tokens are chosen; the answer is the same whatever else is being written.
        stop: texts that end the answer and are no part of it.
        logprobs: score tokens, with so many alternatives each; None scores none.
    """

    prompt: str | Fields | tuple[int, ...] | Prompt
    prefix: str | None = None
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):
            # A text is a sequence of texts, too: each of its letters would end the answer.
            raise ConfigError("stop", expected="a tuple of texts", found="one text")
        if "" in self.stop:
            raise ConfigError("stop", expected="texts", found="an empty one", next_step="leave it out")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError("logprobs", expected="0 or more", found=str(self.logprobs))


@dataclass(frozen=True)
class TokenScore:
    """A token that was written, as the model scored it: before temperature, penalties and cuts.

    Attributes:
        token: its id.
        text: what it decodes to by itself.
        logprob: in nats.
        top: the likeliest tokens in its place: id, text and logprob.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """More text of one request. The last piece, whose text may be empty, has its completion.

    Attributes:
        number: of the request.
        scores: of the token behind this piece, where they were asked for.
    """

    number: int
    text: str
    completion: Completion | None = None
    scores: tuple[TokenScore, ...] = ()
