"""A session that writes many texts at once: requests in, pieces of text out."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from prefixkit.errors import ConfigError
from prefixkit.serving.batching import Batching
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.generation import Prompt
from prefixkit.serving.prompts import LEAST_NEW_TOKENS
from prefixkit.serving.request import BusyError, Progress, Request
from prefixkit.serving.session import Session
from prefixkit.serving.writing_row import WritingRow

CAPACITY = 2048
"""Slots of a row, unless the model's context is shorter."""


class Engine:
    """A session that writes many texts at once. Nothing of it is to be called from two threads at a time.

    Attributes:
        session: the model and its prefixes, which may be added, replaced and dropped at any time.
        shared: the name of the one that is kept once for all rows.
    """

    def __init__(
        self,
        session: Session,
        *,
        rows: int = 8,
        capacity: int | None = None,
        waiting: int = 64,
        shared: str | None = None,
    ) -> None:
        """Make room for `rows` texts at once, of at most `capacity` slots each, prefixes included.

        Args:
            waiting: how many requests may wait while no row is free.
            shared: the name of a long prefix that many requests have. It is kept once, and takes no slots of their
                rows; the others are copied into theirs. While it is replaced, requests behind the new one wait for
                those behind the old.

        Raises:
            InputError: a folder whose graph has no buffers, or none for sharing; numbers below 1.
        """
        if not isinstance(session.runtime, BufferedRuntime):
            step = "export again with --target cuda, which runs on a CPU as well"
            where, found = str(session.report.folder), "a graph without them"
            raise ConfigError(where, expected="graphs that write into buffers", found=found, next_step=step)
        for name, number in (("rows", rows), ("capacity", capacity), ("waiting", waiting)):
            if number is not None and number < 1:
                raise ConfigError(name, expected="1 or more", found=str(number))
        self.session, self.most_waiting, self.shared = session, waiting, shared
        self.capacity = capacity or min(session.report.backbone.context_length or CAPACITY, CAPACITY)
        self._batching = Batching(session.runtime.rows(rows, self.capacity, whole=True, sharing=shared is not None))
        self._numbers = count()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._batching.waiting)

    @property
    def running(self) -> int:
        """Requests that are being written."""
        return self._batching.running

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def submit(self, request: Request) -> int:
        """Take in a request; gives its number.

        Raises:
            BusyError: too many wait already.
            InputError: an unknown prefix, or a prompt that does not fit its task, the context or the capacity.
        """
        most = self.most_waiting + self._batching.free
        if self.waiting >= most:
            expected, found = f"fewer than {most} waiting", f"{self.waiting}"
            raise BusyError("requests", expected=expected, found=found, next_step="ask again later")
        number = next(self._numbers)
        prompt, tokenizer = self._prompt(request), self.session.tokenizer
        row = WritingRow(number, prompt, tokenizer, request.sampling, request.stop, request.logprobs)
        self._batching.waiting.append(row)
        return number

    def cancel(self, number: int) -> None:
        """Forget a request. One that is unknown, or done, is ignored."""
        self._batching.cancel(number)

    def step(self) -> list[Progress]:
        """Admit what waits, as far as there are rows, and write one token of everything."""
        return self._batching.step()

    def _prompt(self, request: Request) -> Prompt:
        prompt = self.session.prompt(request.prompt, request.prefix, "prompt", request.max_new_tokens)
        if prompt.before is not None and prompt.before.length and request.prefix == self.shared:
            prompt = replace(prompt, shared=True)
        # The last token is written and never read.
        room, least = self.capacity - prompt.slots + 1, request.max_new_tokens or LEAST_NEW_TOKENS
        if room < least:
            parts = "prompt" if prompt.shared else "prefix, prompt"
            expected = f"{parts} and {least} new tokens in the {self.capacity} slots of a row"
            found, step = f"{prompt.slots} before the answer", "shorten it, or start with a larger --capacity"
            raise ConfigError("prompt", expected=expected, found=found, next_step=step)
        return replace(prompt, max_new_tokens=min(prompt.max_new_tokens, room))
