"""One long prefix that all rows share, kept once, against a different one for each: time a token, and memory."""

from __future__ import annotations

from tests.bench.fresh import of_process
from tests.bench.rounds import Row, alternate, compare
from tests.bench.serving_alone import device_memory
from tests.bench.serving_ours import OurEngine
from tests.bench.serving_speed import FIRST, PER_TOKEN, taken
from tests.bench.serving_work import Effort, Tell, Turn, UnequalError, Work

DIFFERENT = "a prefix for each row"
MEMORY = "memory of the session, MiB"


def measure(case: str, work: Work, effort: Effort, tell: Tell) -> list[Row]:
    """Shared against different; each has a session of its own.

    Raises:
        UnequalError: rows behind the same prefix write what they do not write behind their own.
    """
    prefixes, used = work.prefixes, _used(work)
    shared, after_shared = _begun(OurEngine(work, prefixes[:1], shared=True))
    different, after_both = _begun(OurEngine(work))
    tell(f"{case}: {after_shared - used:.0f} and {after_both - after_shared:.0f} MiB with weights")
    if shared.write().tokens[0] != different.write().tokens[0] or shared.write().tokens == different.write().tokens:
        raise UnequalError(f"{case}: not the same work in the first row, or the same in all")
    turns: dict[str, list[Turn]] = {"ours": [], DIFFERENT: []}
    takes = {"ours": taken(shared, turns["ours"]), DIFFERENT: taken(different, turns[DIFFERENT])}
    rows = compare(case, PER_TOKEN, alternate(takes, effort.rounds))
    rows += compare(case, FIRST, {name: [1000 * turn.first for turn in each] for name, each in turns.items()})
    grown = {"ours": after_shared - used, DIFFERENT: after_both - after_shared}
    # What is smaller than a MiB is noise, or nothing.
    return rows + compare(case, MEMORY, {name: [max(each, 1.0)] for name, each in grown.items()})


def _begun(one: OurEngine) -> tuple[OurEngine, float]:
    one.write()
    return one, _used(one.work)


def _used(work: Work) -> float:
    return device_memory() if work.device == "cuda" else of_process("VmRSS")
