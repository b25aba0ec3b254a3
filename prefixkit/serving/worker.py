"""One thread that owns an engine, and the way to it from asyncio.

Whatever touches the engine is a command, which the thread executes between two steps, in the order of asking: a
cancellation therefore always meets the request that it is for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from prefixkit.serving.delivery import Answers, ClosedError, EngineError, Watch
from prefixkit.serving.engine import Engine
from prefixkit.serving.request import Progress, Request

FAILURES = 3
"""Steps that may fail one after the other before the engine counts as broken."""

_PATIENCE = 30.0
"""Seconds for the last step."""

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Worker:
    """An engine in a thread of its own.

    Attributes:
        fault: why nothing can be written any more; None while all is well.
        running, waiting: requests, as of the last step.
    """

    def __init__(self, engine: Engine) -> None:
        self.fault: str | None = None
        self.running, self.waiting = 0, 0
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._owners: dict[int, tuple[Answers, int]] = {}
        self._failures, self._closed, self._ended = 0, False, False
        self._thread = Thread(target=self._work, name="prefixkit-engine", daemon=True)

    def start(self) -> None:
        """Begin to work, for the event loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """End the thread; what is being written fails. A step that never returns is left behind."""
        self._closed = True
        self._commands.put(self._end)
        await asyncio.to_thread(self._thread.join, _PATIENCE)

    async def call(self, work: Callable[[Engine], _Result]) -> _Result:
        """What `work` returns or raises, executed between two steps.

        Raises:
            EngineError: the engine is broken or closed.
        """
        if self._closed:
            raise ClosedError()
        outcome: asyncio.Future[_Result] = self._loop.create_future()

        def command() -> None:
            try:
                if self.fault is not None:
                    raise EngineError("engine", found=self.fault)
                result = work(self._engine)
            except Exception as error:
                self._tell(_refuse, outcome, error)
            else:
                self._tell(_settle, outcome, result)

        self._commands.put(command)
        return await outcome

    async def submit(self, requests: Sequence[Request], watch: Watch = lambda index, progress: None) -> Answers:
        """Ask for all of `requests`, or for none where one is refused.

        Args:
            watch: is called with what arrives, when it does.

        Raises:
            InputError: a request that does not fit; BusyError where too many wait.
            EngineError: the engine is broken or closed.
        """
        answers = Answers(len(requests), self._forget, watch)
        try:
            await self.call(lambda engine: self._submit(engine, requests, answers))
        except BaseException:
            # Whoever asked may have been cancelled while the thread is still at it.
            answers.close()
            raise
        return answers

    async def stream(self, request: Request) -> AsyncIterator[Progress]:
        """What is written for one request; leaving the iterator early cancels it. Raises as `submit` does."""
        answers = await self.submit([request])
        try:
            async for _, progress in answers:
                yield progress
        finally:
            answers.close()

    def _forget(self, answers: Answers) -> None:
        self._commands.put(lambda: self._cancel(answers))

    # What follows runs in the thread.

    def _work(self) -> None:
        while not self._ended:
            try:
                self._obey()
                self._count()
                self._step()
            except Exception as error:
                self._fail(error)
        # Nothing new is begun, and nobody is left waiting for an outcome.
        with suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _obey(self) -> None:
        """Execute the commands that wait; where there is nothing to write, wait for one."""
        with suppress(Empty):
            block = self.fault is not None or self._engine.idle
            while True:
                self._commands.get(block)()
                block = False

    def _step(self) -> None:
        if self.fault is not None or self._engine.idle:
            return
        made = self._engine.step()
        self._failures = 0
        self._count()
        arrived = [(*self._owners[one.number], one) for one in made if one.number in self._owners]
        for one in made:
            if one.completion is not None:
                self._owners.pop(one.number, None)
        if arrived:
            self._tell(_deliver, arrived)

    def _count(self) -> None:
        self.running, self.waiting = self._engine.running, self._engine.waiting

    def _submit(self, engine: Engine, requests: Sequence[Request], answers: Answers) -> None:
        try:
            for index, request in enumerate(requests):
                number = engine.submit(request)
                answers.numbers.append(number)
                self._owners[number] = answers, index
        except Exception:
            self._cancel(answers)
            raise

    def _cancel(self, answers: Answers) -> None:
        for number in answers.numbers:
            if self._owners.pop(number, None) is not None and self.fault is None:
                self._engine.cancel(number)

    def _fail(self, error: Exception) -> None:
        """Give up what is being written, for nobody knows what state it is in."""
        told, owners = f"{type(error).__name__}: {error}", self._all_answers()
        _log.error("the engine failed, and %d requests with it: %s", len(self._owners), told, exc_info=error)
        self._failures += 1
        try:
            for answers in owners:
                self._cancel(answers)
        except Exception as second:
            told, self._failures = f"{told}; then {type(second).__name__}: {second}", FAILURES
        if self._failures >= FAILURES:
            self.fault = f"it fails at every step: {told}"
            _log.error("the engine is given up")
        self._tell(_fail_all, owners, EngineError("engine", found=told))

    def _end(self) -> None:
        self._ended, owners = True, self._all_answers()
        self._tell(_fail_all, owners, ClosedError())
        for answers in owners:
            self._cancel(answers)
        self.fault = self.fault or "it is closed"

    def _all_answers(self) -> list[Answers]:
        return list({id(answers): answers for answers, _ in self._owners.values()}.values())

    def _tell(self, receive: Callable[..., None], *arguments: object) -> None:
        # A loop that is closed has nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(receive, *arguments)


def _settle(outcome: asyncio.Future[_Result], result: _Result) -> None:
    if not outcome.done():
        outcome.set_result(result)


def _refuse(outcome: asyncio.Future[_Result], error: Exception) -> None:
    if not outcome.done():
        outcome.set_exception(error)


def _deliver(arrived: Sequence[tuple[Answers, int, Progress]]) -> None:
    for answers, index, progress in arrived:
        answers.put((index, progress))


def _fail_all(owners: Sequence[Answers], fault: EngineError) -> None:
    for answers in owners:
        answers.put(fault)
