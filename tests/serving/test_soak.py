"""A long day: requests of all lengths come and go, some are called off, prefixes are exchanged under their names.

pytest -m matrix tests/serving/test_soak.py    # 2,000 requests
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field, replace

import psutil
import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.prefix import Prefix
from prefixkit.serving.engine import Engine
from prefixkit.serving.generation import Completion
from prefixkit.serving.request import Request
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.session import Session
from tests.exported import backbone, exported, random_prefix

NAMES = ("a", "b", "c")
PROMPTS = ["Blue Spice", "The Eagle is a coffee shop near Burger King .", "x", "near the river", "a pub in the city"]
MIB = 1 << 20


@dataclass
class Day:
    """What happens, drawn from one seed, and what every request must be answered."""

    session: Session
    versions: list[Prefix]
    random: random.Random
    current: dict[str, int] = field(default_factory=dict)
    alone: dict[tuple[Request, int | None], Completion] = field(default_factory=dict)

    def exchange(self, name: str) -> None:
        """Give `name` another prefix."""
        self.current[name] = self.random.randrange(len(self.versions))
        self.session.add_prefix(name, self.versions[self.current[name]])

    def asked(self) -> tuple[Request, int | None]:
        """A request, and the version of its prefix by now."""
        name = self.random.choice((*NAMES, None))
        sampling = (
            Sampling() if self.random.random() < 0.7 else Sampling(temperature=1.2, seed=self.random.randrange(3))
        )
        prompt, length = self.random.choice(PROMPTS), self.random.choice((1, 2, 5, 12, 24))
        request = Request(prompt=prompt, prefix=name, max_new_tokens=length, sampling=sampling)
        return request, None if name is None else self.current[name]

    def answer(self, request: Request, version: int | None) -> Completion:
        """What the model writes with nobody beside it."""
        key = (replace(request, prefix=None), version)
        if key not in self.alone:
            if version is not None:
                self.session.add_prefix("alone", self.versions[version])
            engine = Engine(self.session, rows=1, capacity=80)
            engine.submit(replace(request, prefix=None if version is None else "alone"))
            (self.alone[key],) = (one.completion for _ in range(99) for one in engine.step() if one.completion)
        return self.alone[key]


@pytest.mark.parametrize("requests", [120, pytest.param(2000, marks=pytest.mark.matrix)])
def test_every_answer_is_that_of_the_request_alone(requests: int) -> None:
    identity = load_backbone(backbone("gpt2")).identity
    versions = [random_prefix(identity, seed=seed, length=length) for seed, length in enumerate((1, 5, 12, 30))]
    session = Session(exported("gpt2", target="cuda").folder, device="cpu", threads=1)
    day = Day(session, versions, random.Random(7))
    for name in NAMES:
        day.exchange(name)
    engine = Engine(session, rows=6, capacity=80, waiting=20)
    pending: dict[int, tuple[Request, int | None]] = {}
    asked = cancelled = 0
    memory: list[int] = []
    while asked < requests or not engine.idle:
        while asked < requests and engine.waiting < 20 and day.random.random() < 0.6:
            request, version = day.asked()
            pending[engine.submit(request)] = request, version
            asked += 1
        if day.random.random() < 0.05:
            day.exchange(day.random.choice(NAMES))
        if pending and day.random.random() < 0.05:
            number = day.random.choice(list(pending))
            engine.cancel(number)
            del pending[number]
            cancelled += 1
        for progress in engine.step():
            if progress.completion is not None:
                assert progress.completion == day.answer(*pending.pop(progress.number))
        if asked % 100 == 0:
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
    assert not pending
    assert cancelled > requests / 40
    assert len({completion.token_ids for completion in day.alone.values()}) > len(day.alone) / 2
    assert memory[-1] - memory[len(memory) // 2] < 16 * MIB
