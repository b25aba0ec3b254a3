"""Serving, side by side: ours each way, transformers, PEFT, onnxruntime-genai, the roof. From the project's root:

    python -m tests.bench.serve [--cases NAME,…] [--rounds N] [--json FILE] [--device cpu|cuda] [--threads N]
        [--genai-python PATH] [--folder DIR] [--quick]

All read the same prompts behind the same prefixes on the same weights, greedy, in turns. Before the first turn they
must write the same tokens, and others without prefixes; else nothing is reported. Peak memory comes from new processes.

Backbones are random weights of a case's shape, but for gpt2-15m, a folder below `--backbones`. `--folder` keeps them
and their exports for the next time. `--quick` tries the program: tiny shapes on the CPU, also of the cases for CUDA.
Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench import serving_folders, serving_prefill, serving_shared, serving_speed, serving_swap, serving_ttft
from tests.bench.rounds import Row, table
from tests.bench.serving_contenders import GENAI, TRANSFORMERS
from tests.bench.serving_work import Effort, Work
from tests.bench.shapes import LLAMA3_8B, LLAMA_100M, QWEN3_600M, QWEN3_1700M

GPT2_15M = "gpt2-15m"
SHAPES = {"llama-100m": LLAMA_100M, "qwen06": QWEN3_600M, "qwen17": QWEN3_1700M, "8b": LLAMA3_8B}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256},
    "llama": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    "qwen3": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
}


@dataclass(frozen=True)
class Case:
    """What a name stands for.

    Attributes:
        backbone: of `SHAPES`, or a folder below `--backbones`.
        rows: texts at once.
        length: slots of a prefix.
        device: None runs on either.
        measure: gives its rows.
        on_cuda: the backbone there, where that is another one.
    """

    backbone: str
    rows: int
    length: int
    device: str | None = "cuda"
    new: int = 64
    measure: Callable[..., list[Row]] = serving_speed.measure
    on_cuda: str | None = None


def _decoding(bar: float) -> Callable[..., list[Row]]:
    return partial(serving_speed.measure, bar=bar)


CASES = {
    "cpu-gpt2-15m-b1": Case(GPT2_15M, 1, 16, "cpu"),
    "cpu-gpt2-15m-b8": Case(GPT2_15M, 8, 16, "cpu"),
    "cpu-llama-100m-b1": Case("llama-100m", 1, 16, "cpu", 32),
    "cpu-llama-100m-b8": Case("llama-100m", 8, 16, "cpu", 32),
    "cpu-shared-p2048-b8": Case("llama-100m", 8, 2048, "cpu", 32, serving_shared.measure),
    "swap": Case("llama-100m", 4, 512, None, 256, serving_swap.measure, "qwen06"),
    "h200-qwen06-b1-p20": Case("qwen06", 1, 20),
    "h200-qwen06-b32-p20": Case("qwen06", 32, 20),
    "h200-qwen06-b1-p2048": Case("qwen06", 1, 2048, measure=_decoding(1.8)),
    "h200-qwen06-b32-p2048": Case("qwen06", 32, 2048, measure=_decoding(3.2)),
    "h200-qwen17-b1-p20": Case("qwen17", 1, 20, measure=_decoding(2.0)),
    "h200-8b-b1-p20": Case("8b", 1, 20),
    "h200-prefill-b32": Case("qwen06", 32, 20, measure=partial(serving_prefill.measure, bar=8.0)),
    "h200-shared-p2048-b32": Case("qwen06", 32, 2048, measure=serving_shared.measure),
    "h200-ttft-p2048-b32": Case("qwen06", 32, 2048, measure=serving_ttft.measure),
}
PROMPT = 32
"""Tokens."""


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one case.

    Raises:
        UnequalError: contenders that do not the same work.
    """
    case = CASES[name]
    work = work_of(case, options)
    effort = Effort(2 if options.quick else options.rounds, options.alone, options.genai_python)
    return case.measure(name, work, effort, tell)


def work_of(case: Case, options: argparse.Namespace) -> Work:
    """What `case` gives every contender; what is missing of its folders is made."""
    device = "cpu" if options.quick else case.device or options.device or "cpu"
    dtype = options.dtype if device == "cuda" else "float32"
    wanted = case.on_cuda if device == "cuda" and case.on_cuda else case.backbone
    if wanted in SHAPES or options.quick:
        shape = tiny(wanted) if options.quick else SHAPES[wanted]
        label = f"tiny-{shape['model_type']}" if options.quick else wanted
        source = serving_folders.backbone(label, shape, options.folder, dtype, device, tell)
        home = source.parent
    else:
        source, home = options.backbones / wanted, options.folder / f"{wanted}-{dtype}"
    buffered, portable = serving_folders.exports(source, home, dtype, tell)
    if options.quick:
        case = replace(case, rows=min(case.rows, 3), length=min(case.length, 24), new=6)
    return Work(
        backbone=str(source),
        buffered=buffered,
        portable=portable,
        rows=case.rows,
        length=case.length,
        prompt=8 if options.quick else PROMPT,
        new=case.new,
        device=device,
        dtype=dtype,
        threads=options.threads,
    )


def tiny(name: str) -> Mapping[str, Any]:
    """A small shape of the same family."""
    shape: Mapping[str, Any] = SHAPES.get(name, {"model_type": "gpt2"})
    family = str(shape["model_type"])
    grouped = {} if family == "gpt2" else {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    # With so few weights, the usual range gives models that repeat their input whatever stands before it.
    return {"model_type": family, "vocab_size": 8192, "initializer_range": 0.1, **TINY[family], **grouped}


def why_not(name: str, options: argparse.Namespace) -> str | None:
    """Why a case cannot run here; None where it can."""
    case = CASES[name]
    if options.quick:
        return None
    if "cuda" in (case.device, options.device) and not torch.cuda.is_available():
        return "there is no CUDA device here"
    if case.backbone == GPT2_15M and not (options.backbones / GPT2_15M / "config.json").exists():
        return f"there is no {options.backbones / GPT2_15M}; --backbones names the folder that has it"
    return None


def without_genai(rows: list[Row]) -> list[str]:
    """Cases of decoding in which onnxruntime-genai has no part."""
    compared = {row.case for row in rows if row.peer_name == TRANSFORMERS}
    return sorted(compared - {row.case for row in rows if row.peer_name == GENAI})


def tell(message: str) -> None:
    """Progress, beside the table."""
    print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="only the cases of this device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the cases for CUDA")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument(
        "--genai-python", help="an interpreter with onnxruntime-genai; without it that peer is left out"
    )
    parser.add_argument("--alone", type=int, default=1, help="processes for memory, a contender; 0 leaves it out")
    parser.add_argument("--backbones", type=Path, default=Path("../shared/backbones"), help="the folder of gpt2-15m")
    parser.add_argument("--folder", type=Path, help="keeps backbones and exports")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases.split(",")) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    wanted = [
        name for name in options.cases.split(",") if options.device in (None, CASES[name].device or options.device)
    ]
    missing = {name: reason for name in wanted if (reason := why_not(name, options))}
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = options.folder or Path(folder)
        for name in (name for name in wanted if name not in missing):
            tell(f"{name} …")
            try:
                rows += measure(name, options)
            except Exception as error:  # whatever a runtime raises: the other cases are measured all the same
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if options.json is not None:
                options.json.write_text(json.dumps([row.record() for row in rows], indent=1) + "\n")
    print(table(rows))
    if without := without_genai(rows):
        why = "there is no --genai-python" if options.genai_python is None else "it cannot run the model, as told above"
        print(f"\nonnxruntime-genai was left out: {why}: {', '.join(without)}.")
    for name, reason in missing.items():
        print(f"\nNot run: {name}: {reason}.")
    if failed:
        sys.exit("\n".join(f"{name}: {reason}" for name, reason in failed.items()))


if __name__ == "__main__":
    main()
