"""What `prefixkit inspect` costs: processor seconds of a whole process, for a good file and for every kind of bad one.

    python -m tests.bench.inspect_cost

Each is run in a fresh process, several times; the least is printed, as the rest is the machine's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cli.test_inspect import BAD, GOLDEN
from tests.format.test_header import BOMBS, write_safetensors

RUNS = 3
INSPECT = "import sys, time; from prefixkit.cli import run; run(['inspect', sys.argv[1]]); print(time.process_time())"


def seconds(path: Path) -> float:
    """Processor seconds of `prefixkit inspect PATH`, start and imports included."""
    command = [sys.executable, "-c", INSPECT, str(path)]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(RUNS))
    return min(float(done.stdout.splitlines()[-1]) for done in runs)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {"a good file": GOLDEN}
        files |= {name: make(Path(folder) / f"bad{number}") for number, (name, make) in enumerate(BAD.items())}
        for number, (name, header) in enumerate(BOMBS.items()):
            files[f"2 MiB of {name}"] = write_safetensors(Path(folder) / f"bomb{number}", header, b"!")
        print("| file | processor seconds |\n|---|---:|")
        for name, path in files.items():
            print(f"| {name} | {seconds(path):.2f} |")


if __name__ == "__main__":
    main()
