"""An engine without a model: every request is answered with numbered words, and what it was asked is kept."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

from prefixkit.errors import InputError
from prefixkit.serving.generation import Completion
from prefixkit.serving.request import BusyError, Progress, Request, TokenScore

ENDLESS = 10**6


class ScriptedEngine:
    """Writes `PREFIX-0 PREFIX-1 …` up to the tokens that were asked for, a word a step, each row's in turn.

    Attributes:
        seconds: that a step takes.
        failures: steps that are going to fail.
    """

    def __init__(self, session: Any = None, *, rows: int = 2, waiting: int = 2) -> None:
        self.session = session or SimpleNamespace(prefixes={})
        self.rows, self.most_waiting, self.capacity = rows, waiting, 64
        self.seconds, self.failures = 0.001, 0
        self.shared: str | None = None
        self.asked: list[Request] = []
        self.cancelled: list[int] = []
        self._waiting: deque[int] = deque()
        self._running: dict[int, list[str]] = {}

    def submit(self, request: Request) -> int:
        if request.prompt == "refused":
            raise InputError("prompt", expected="another")
        if len(self._running) + len(self._waiting) >= self.rows + self.most_waiting:
            raise BusyError("engine", expected="fewer requests", found="too many")
        self.asked.append(request)
        self._waiting.append(len(self.asked) - 1)
        return len(self.asked) - 1

    def cancel(self, number: int) -> None:
        if number in self._waiting:
            self._waiting.remove(number)
        elif self._running.pop(number, None) is None:
            return
        self.cancelled.append(number)

    def step(self) -> list[Progress]:
        time.sleep(self.seconds)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is gone")
        while self._waiting and len(self._running) < self.rows:
            self._running[self._waiting.popleft()] = []
        return [self._write(number) for number in list(self._running)]

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def _write(self, number: int) -> Progress:
        request, words = self.asked[number], self._running[number]
        word = f"{' ' if words else ''}{request.prefix}-{len(words)}"
        words.append(word)
        scores = () if request.logprobs is None else (TokenScore(len(words), word, -0.5, ()),)
        if len(words) < (request.max_new_tokens or 4):
            return Progress(number, word, scores=scores)
        del self._running[number]
        ids = tuple(range(len(words)))
        completion = Completion(text="".join(words), token_ids=ids, finish="length", prompt_tokens=3)
        return Progress(number, word, completion, scores)
