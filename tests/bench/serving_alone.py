"""One contender in a process of its own: the most memory that it takes for a turn, libraries and weights included.

On a CPU that is the high-water mark of the resident set, on CUDA what the whole device holds more than before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from tests.bench.serving_work import Work

PEAK = "peak memory of a process of its own, MiB"


def measure(work: Work, contender: str, genai: str | None) -> float:
    """Its peak.

    Raises:
        RuntimeError: the process failed; its last line of complaint.
    """
    before = device_memory() if work.device == "cuda" else 0.0
    command = [sys.executable, "-m", "tests.bench.serving_alone", contender, json.dumps(asdict(work)), genai or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout.splitlines()[-1]) - before


def device_memory() -> float:
    """What the GPU holds, of all processes, in MiB."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0])


def resident_peak() -> float:
    """The largest resident set of this process so far, in MiB."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(contender: str, described: str, genai: str) -> None:
    work = Work(**json.loads(described))
    # Behind the arguments, so that a process of ours does not import the peers' libraries.
    from tests.bench.serving_contenders import build

    one = build(contender, work, genai or None)
    one.write()
    print(device_memory() if work.device == "cuda" else getattr(one, "peak", None) or resident_peak())


if __name__ == "__main__":
    main(*sys.argv[1:])
