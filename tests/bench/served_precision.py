"""What a served precision costs: a prefix trained on E2E, in float32, in each half precision that the machine can run,
with weights of eight and four bits, and with keys and values of eight.

    python -m tests.bench.served_precision --json tests/bench/results/served_precision_cpu.json

Teacher-forced: of the tokens of a reference, behind those before it, how often the likeliest one is that of float32.
Greedy: BLEU over the inputs of the E2E sample inside the package, and how many texts are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefixkit.data.readers import read_examples
from prefixkit.data.references import ReferenceGroup, group_references
from prefixkit.export.onnx import DTYPES, export_onnx
from prefixkit.export.quantized import BITS
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.engine import Engine
from prefixkit.serving.generation import Prompt
from prefixkit.serving.request import Request
from prefixkit.serving.session import OWN, Session
from prefixkit.training.metrics.bleu import bleu

PREFIX = Path(__file__).parent / "results" / "e2e_long_run.safetensors"
ROWS = 8
CAPACITY = 192
KV_CACHE = "int8 cache"
AGREEMENT, BLEU = 0.99, 0.5
"""The least share of equal tokens, and the most that BLEU may differ."""


def served(dtype: str, folder: Path, device: str) -> Session:
    """The embedded backbone with the trained prefix, exported in `dtype`, or with its weights or cache in it."""
    # There is no float32 on a GPU.
    others = {"dtype": "float32" if device == "cpu" else "bfloat16"}
    rounded = {"quantize": dtype} if dtype in BITS else {"kv_cache": "int8"}
    precision = {"dtype": dtype} if dtype in DTYPES["cuda"] else {**others, **rounded}
    export_onnx(PREFIX, BACKBONE, folder / dtype, target="cuda", **precision)  # type: ignore[arg-type]
    return Session(folder / dtype, device="cpu" if dtype == "float32" else device, threads=2)  # type: ignore[arg-type]


def forced(session: Session, groups: Sequence[ReferenceGroup]) -> list[int]:
    """The likeliest token at every place of the first reference of each group."""
    found: list[int] = []
    for start in range(0, len(groups), ROWS):
        some = groups[start : start + ROWS]
        prompts = [session.prompt(dict(group.fields), OWN, "input", 1) for group in some]
        targets = [session.tokenizer.encode_text(f" {group.references[0]}") for group in some]
        found += [token for row in _forced(session, prompts, targets) for token in row]
    return found


def _forced(session: Session, prompts: Sequence[Prompt], targets: Sequence[list[int]]) -> list[list[int]]:
    assert isinstance(session.runtime, BufferedRuntime)
    rows = session.runtime.rows(len(prompts), CAPACITY)
    for row, prompt in enumerate(prompts):
        rows.begin(row, prompt.before)
    written = [[token] for token in rows.read(0, [prompt.ids for prompt in prompts]).tokens.tolist()]
    for place in range(max(map(len, targets))):
        likeliest = rows.read(0, [target[place : place + 1] for target in targets]).tokens.tolist()
        for row, target in enumerate(targets):
            if place < len(target):
                written[row].append(likeliest[row])
    return written


def greedy(session: Session, groups: Sequence[ReferenceGroup]) -> list[str]:
    """What is written for each input."""
    engine, texts = Engine(session, rows=ROWS, capacity=CAPACITY, waiting=len(groups)), {}
    numbers = [engine.submit(Request(prompt=dict(group.fields), prefix=OWN, max_new_tokens=80)) for group in groups]
    while not engine.idle:
        texts.update({one.number: one.completion.text for one in engine.step() if one.completion is not None})
    return [texts[number] for number in numbers]


def measure(dtypes: Sequence[str], limit: int, device: str) -> list[dict[str, Any]]:
    """A row for each of `dtypes`, of which the first is what the others are held against."""
    groups, rows, known = group_references(read_examples(E2E / "test.jsonl"))[:limit], [], None
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            session = served(dtype, Path(folder), device)
            tokens, texts = np.array(forced(session, groups)), greedy(session, groups)
            known = known or (tokens, texts)
            rows.append(
                {
                    "dtype": dtype,
                    "tokens": len(tokens),
                    "agreement": round(float((tokens == known[0]).mean()), 5),
                    "bleu": round(bleu(texts, [group.references for group in groups]), 2),
                    "equal_texts": sum(map(str.__eq__, texts, known[1])),
                    "texts": len(texts),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=630, help="inputs at most")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    dtypes = ["float32", "float16"] + (["bfloat16"] if options.device == "cuda" else []) + [*BITS, KV_CACHE]
    rows = measure(dtypes, options.limit, options.device)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        kept = row["agreement"] >= AGREEMENT and abs(row["bleu"] - rows[0]["bleu"]) <= BLEU
        print(f"{row['dtype']}: {row['agreement']:.2%} of {row['tokens']} tokens, BLEU {row['bleu']}, kept: {kept}")


if __name__ == "__main__":
    main()
