"""The results of tests.bench.e2e as a table in Markdown: mean and standard deviation over seeds.

python -m tests.bench.e2e_table results.jsonl
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SCORES = ("bleu", "nist", "rouge_l", "cider")


def table(rows: list[dict[str, Any]]) -> str:
    """One line an arm, in the order of first appearance."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        arms[row["arm"]].append(row)
    titles = ("arm", "seeds", "trained numbers", "steps", "BLEU", "NIST", "ROUGE-L", "CIDEr")
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for arm, runs in arms.items():
        counts = [f"{len(runs)}", *(_mean(runs, name, ",.0f") for name in ("parameters", "steps"))]
        lines.append(f"| {arm} | {' | '.join([*counts, *(_spread(runs, score) for score in SCORES)])} |")
    return "\n".join(lines)


def _mean(runs: list[dict[str, Any]], name: str, form: str) -> str:
    return f"{mean(run[name] for run in runs):{form}}" if name in runs[0] else "-"


def _spread(runs: list[dict[str, Any]], score: str) -> str:
    values = [run[score] for run in runs]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
