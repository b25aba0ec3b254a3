"""One run in several processes, as torchrun starts them: what each does, what they agree on, how they end together.

Numbers that decide anything are summed on the CPU, through gloo: a GPU is never waited for, and all processes get the
same bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from prefixkit.errors import ConfigError, InputError, PrefixkitError
from prefixkit.training.interruption import AtOnce

Row = TypeVar("Row")
_RUNS = count()
_GRACE = 2.0
"""Seconds that a process which failed second leaves to the first, to say why."""


class LostProcessError(PrefixkitError):
    """Another process of the run was killed, or cannot be reached."""


@dataclass(frozen=True)
class Group:
    """The processes of a run; one alone is a group, too.

    Attributes:
        rank: which of them this is, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and tells."""
        return self.rank == 0

    def share(self, rows: Sequence[Row]) -> tuple[Sequence[Row], int]:
        """What this process is to compute of `rows`, and how much it counts, 1 or 0.

        With fewer rows than processes some compute the first one for nothing: all take part in every exchange.
        """
        own = rows[self.rank :: self.size]
        return (own, 1) if own else (rows[:1], 0)

    def summed(self, *numbers: float) -> list[float]:
        """Each of `numbers`, summed over the processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def of_first(self, number: float) -> float:
        """The first process's `number`."""
        return self.summed(number if self.first else 0.0)[0]

    def together(self, check: Callable[[], None]) -> None:
        """Raise KeyboardInterrupt in every process if `check` does in one."""
        try:
            check()
            pressed = 0
        except KeyboardInterrupt:
            pressed = 1
        if self.summed(pressed)[0]:
            raise KeyboardInterrupt

    def wait(self) -> None:
        """Until all processes are here."""
        self.summed(0)


ALONE = Group()


def size() -> int:
    """How many processes torchrun has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the only one, or the one that writes files and tells."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device: str) -> Iterator[Group]:
    """The processes that torchrun has started, connected for the length of a `with` block; else this one alone.

    An error is raised by the process that meets it first; the others end with its exit code and without a word.

    Raises:
        ConfigError: fewer GPUs than processes.
        LostProcessError: another process is there no longer.
    """
    if size() == 1:
        yield ALONE
        return
    given, rank, many = next(rendezvous("env://"))
    # Of two runs of one program the second would meet the addresses of the first.
    store = PrefixStore(f"prefixkit/{next(_RUNS)}", given)
    try:
        distributed.init_process_group(_backend(device), store=store, rank=rank, world_size=many)
        yield Group(rank, many)
    except AtOnce:
        _is_first_to_fail(store, rank)
        raise
    except KeyboardInterrupt:
        distributed.destroy_process_group()
        if rank:
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if _is_first_to_fail(store, rank):
            _refuse_lost(error)
            raise
        time.sleep(_GRACE)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    distributed.destroy_process_group()


@contextmanager
def told_once() -> Iterator[None]:
    """A `with` block before the processes are connected, in which all of a machine make the same mistake.

    The first of them tells of it; the others end with its exit code and without a word.
    """
    try:
        yield
    except InputError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(_GRACE)
        raise SystemExit(2) from None


def refuse_several(what: str, next_step: str = "start it without torchrun") -> None:
    """Raise ConfigError, in one of the processes, where `what` was started in several."""
    with processes("cpu") as group:
        if group.size > 1:
            found = f"{group.size}"
            raise ConfigError("torchrun", expected=f"one process for {what}", found=found, next_step=next_step)


def _backend(device: str) -> str:
    """What the processes talk through; a GPU is chosen for each."""
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        step = f"use --nproc-per-node {found}, or --device cpu"
        raise ConfigError("torchrun", expected="a GPU for each process", found=str(found), next_step=step)
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _refuse_lost(error: Exception) -> None:
    """Raise LostProcessError if `error` is of a connection; gloo's have no class of their own."""
    if isinstance(error, distributed.DistError) or "/gloo/" in str(error):
        expected, found = "every process to go on to the end", "one that is there no longer"
        step = "see below how it ended; where there is a checkpoint, --resume goes on from it"
        raise LostProcessError("torchrun", expected=expected, found=found, next_step=step) from error


def _is_first_to_fail(store: Store, rank: int) -> bool:
    try:
        return bool(store.compare_set("failed", "", str(rank)) == str(rank).encode())
    except Exception:  # the store has gone with the process that kept it, which failed before
        return False
