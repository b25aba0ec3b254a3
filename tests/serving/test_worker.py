"""The thread that owns an engine: order, cancellation, refusals, and what becomes of a step that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from prefixkit.errors import InputError
from prefixkit.serving.delivery import EngineError
from prefixkit.serving.request import BusyError, Request
from prefixkit.serving.worker import FAILURES, Worker
from tests.serving.scripted_engine import ENDLESS, ScriptedEngine


def asking(prefix: str = "a", tokens: int = 4, prompt: str = "x") -> Request:
    return Request(prompt=prompt, prefix=prefix, max_new_tokens=tokens)


@asynccontextmanager
async def working(engine: ScriptedEngine) -> AsyncIterator[Worker]:
    worker = Worker(engine)
    worker.start()
    try:
        yield worker
    finally:
        await worker.close()


def with_worker(engine: ScriptedEngine, use: Callable[[Worker], Awaitable[None]]) -> None:
    async def run() -> None:
        async with working(engine) as worker, asyncio.timeout(30):
            await use(worker)

    asyncio.run(run())


async def text_of(worker: Worker, request: Request) -> str:
    return "".join([progress.text async for progress in worker.stream(request)])


async def until_idle(worker: Worker, engine: ScriptedEngine) -> None:
    while not await worker.call(lambda owned: owned.idle):
        await asyncio.sleep(0.001)


def test_each_gets_its_own_answer() -> None:
    async def use(worker: Worker) -> None:
        found = await asyncio.gather(*(text_of(worker, asking(name, 3)) for name in "abcd"))
        assert found == [f"{name}-0 {name}-1 {name}-2" for name in "abcd"]

    with_worker(ScriptedEngine(), use)


def test_several_are_asked_together_and_told_apart() -> None:
    async def use(worker: Worker) -> None:
        answers = await worker.submit([asking("a", 2), asking("b", 3)])
        texts = ["", ""]
        async for index, progress in answers:
            texts[index] += progress.text
        assert texts == ["a-0 a-1", "b-0 b-1 b-2"]

    with_worker(ScriptedEngine(), use)


def test_leaving_a_stream_cancels_it() -> None:
    engine = ScriptedEngine()

    async def use(worker: Worker) -> None:
        stream = worker.stream(asking(tokens=ENDLESS))
        await anext(stream)
        await stream.aclose()
        await until_idle(worker, engine)
        assert engine.cancelled == [0]

    with_worker(engine, use)


def test_a_finished_request_is_not_cancelled() -> None:
    engine = ScriptedEngine()

    async def use(worker: Worker) -> None:
        await text_of(worker, asking())
        await until_idle(worker, engine)
        assert engine.cancelled == []

    with_worker(engine, use)


def test_whoever_is_cancelled_while_asking_leaves_nothing_behind() -> None:
    engine = ScriptedEngine()
    engine.seconds = 0.05

    async def use(worker: Worker) -> None:
        others = await worker.submit([asking(tokens=ENDLESS)])
        await anext(others)
        task = asyncio.create_task(worker.submit([asking(tokens=ENDLESS)]))
        # The thread is in a step: the request is on its way when its task goes.
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        others.close()
        await until_idle(worker, engine)
        assert len(engine.asked) == len(engine.cancelled) == 2

    with_worker(engine, use)


def test_all_or_none_are_taken() -> None:
    engine = ScriptedEngine()

    async def use(worker: Worker) -> None:
        with pytest.raises(InputError, match="expected another"):
            await worker.submit([asking(tokens=ENDLESS), asking(prompt="refused")])
        with pytest.raises(BusyError):
            await worker.submit([asking(tokens=ENDLESS)] * 5)
        await until_idle(worker, engine)
        assert engine.cancelled == list(range(len(engine.asked)))
        assert await text_of(worker, asking(tokens=1)) == "a-0"

    with_worker(engine, use)


def test_a_failing_step_fails_what_runs_and_the_next_is_answered() -> None:
    engine = ScriptedEngine()

    async def use(worker: Worker) -> None:
        engine.failures = 1
        with pytest.raises(EngineError, match="RuntimeError: the device is gone"):
            await text_of(worker, asking())
        assert worker.fault is None
        assert await text_of(worker, asking(tokens=1)) == "a-0"

    with_worker(engine, use)


def test_an_engine_that_goes_on_failing_is_given_up() -> None:
    engine = ScriptedEngine()

    async def use(worker: Worker) -> None:
        engine.failures = FAILURES
        for _ in range(FAILURES):
            with pytest.raises(EngineError):
                await text_of(worker, asking())
        assert worker.fault == "it fails at every step: RuntimeError: the device is gone"
        with pytest.raises(EngineError, match="it fails at every step"):
            await text_of(worker, asking())

    with_worker(engine, use)


def test_closing_fails_what_runs() -> None:
    async def run() -> None:
        worker = Worker(ScriptedEngine())
        worker.start()
        answers = await worker.submit([asking(tokens=ENDLESS)])
        await worker.close()
        with pytest.raises(EngineError, match="closed"):
            async for _ in answers:
                pass
        with pytest.raises(EngineError, match="closed"):
            await worker.submit([asking()])

    asyncio.run(run())


def test_counts_are_those_of_the_engine() -> None:
    async def use(worker: Worker) -> None:
        answers = await worker.submit([asking(tokens=ENDLESS)] * 4)
        await anext(answers)
        assert (worker.running, worker.waiting) == (2, 2)
        answers.close()
        await worker.call(lambda engine: None)
        while worker.running:
            await asyncio.sleep(0.001)
        assert worker.waiting == 0

    with_worker(ScriptedEngine(), use)
