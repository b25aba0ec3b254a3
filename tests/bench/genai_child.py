"""onnxruntime-genai in an environment of its own: a line of JSON in, a turn, a line of JSON out.

It is run as a file by an interpreter that has onnxruntime-genai and need not have anything of this project:

    PYTHON genai_child.py FOLDER
    {"prompts": [[5, 6], [7, 8]], "new": 3}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai


def turn(model: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    """Write so many tokens behind each of `prompts`, which are equally long; nothing ends a text."""
    ids, began, first = np.array(prompts, dtype=np.int32), time.perf_counter(), 0.0
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, batch_size=len(prompts), max_length=ids.shape[1] + new)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(ids)
    for _ in range(new):
        generator.generate_next_token()
        newest = generator.get_next_tokens()
        first = first or time.perf_counter() - began
    total = time.perf_counter() - began
    tokens = [np.asarray(generator.get_sequence(row))[ids.shape[1] :].tolist() for row in range(len(prompts))]
    assert [row[-1] for row in tokens] == list(newest)
    return {"first": first, "total": total, "tokens": tokens}


def peak() -> float:
    """The largest resident set that this process had, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(folder: str) -> None:
    # The builder's genai_config.json says where it runs, and whether under a CUDA graph.
    model = onnxruntime_genai.Model(folder)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({**turn(model, asked["prompts"], asked["new"]), "peak": peak()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
