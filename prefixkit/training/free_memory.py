"""How much memory is free where a backbone is."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where the system does not say."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = available(_MEMINFO), left_in_group(_GROUP), left_to_process(_PROCESS)
    known = [left for left in limits if left is not None]
    return min(known, default=None) if device.type == "cpu" else None


def available(meminfo: Path) -> int | None:
    """What Linux says is available without swapping."""
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def left_in_group(group: Path) -> int | None:
    """What the limit of a container leaves; None without one."""
    limit, used = group / "memory.max", group / "memory.current"
    if not (limit.is_file() and used.is_file()) or not limit.read_text().strip().isdigit():
        return None
    return max(0, int(limit.read_text()) - int(used.read_text()))


def left_to_process(process: Path) -> int | None:
    """What a limit of the process's own addresses leaves, as `ulimit -v` and some clusters set it; None without one."""
    limits, used = process / "limits", process / "statm"
    if not (limits.is_file() and used.is_file()):
        return None
    named = (line.partition("Max address space")[2].split() for line in limits.read_text().splitlines())
    limit = next((words[0] for words in named if words), "unlimited")
    return max(0, int(limit) - int(used.read_text().split()[0]) * mmap.PAGESIZE) if limit.isdigit() else None
