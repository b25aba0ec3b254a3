"""E2E from 50 to 500 examples: a prefix from words, one from random numbers, LoRA, and everything trained.

    pip install 'prefixkit[examples]' peft
    python examples/low_data.py [STEPS] [--backbone DIR] [--e2e FOLDER] [--seeds N] [--out low_data.jsonl]

After the low-data experiment of Prefix-Tuning (Li & Liang 2021, section 6.3). Each seed draws its own examples, and
30 % as many for validation, which chooses among four points of the run. `--rates` measures the validation loss of four
rates for each arm on another draw of 100 examples. BLEU is of what is written greedily for the first test inputs.
Each result is one line of `--out`, beside which the curves are drawn; a run that was stopped goes on behind the last.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import mkdtemp
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot

from prefixkit import load_backbone
from prefixkit.backbones.decoder import Decoder
from prefixkit.data.batches import TrainingBatches, collate, encode_examples
from prefixkit.data.readers import Example, read_examples
from prefixkit.injections import Injection, KeyValuePrefix
from prefixkit.methods import initialization
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.task import load_task, load_tokenizer
from prefixkit.training import evaluation
from prefixkit.training.objectives import next_token
from prefixkit.training.validation import mean_loss

SIZES = (50, 100, 200, 500)
LENGTH, BATCH, TESTS = 10, 10, 60
RATES = {
    "prefix from words": (0.01, 0.03, 0.1, 0.3),
    "prefix from random": (0.01, 0.03, 0.1, 0.3),
    "LoRA": (0.001, 0.003, 0.01, 0.03),
    "full fine-tuning": (0.00003, 0.0001, 0.0003, 0.001),
}
CHOSEN = {"prefix from words": 0.1, "prefix from random": 0.1, "LoRA": 0.003, "full fine-tuning": 0.0001}


@dataclass
class Arm:
    """What is trained, and what the backbone receives."""

    parameters: list[torch.nn.Parameter]
    received: Callable[[], Injection | None] = lambda: None


def main() -> None:
    options = parse()
    sizes = SIZES if options.steps > 10 else (50,)
    out = Path(options.out or Path(mkdtemp()) / "low_data.jsonl")
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(row["arm"], row["size"], row["seed"], row["rate"]) for row in done}
    rates = RATES if options.rates else {arm: (rate,) for arm, rate in CHOSEN.items()}
    for seed in [99] if options.rates else range(options.seeds):
        for size in (100,) if options.rates else sizes:
            for arm in RATES:
                for rate in rates[arm]:
                    if (arm, size, seed, rate) in known:
                        continue
                    row = result(arm, size, seed, rate, options)
                    with out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    done.append(row)
                    print(row, flush=True)
    rows = [row for row in done if row["seed"] != 99]
    print(table(rows))
    if rows:
        draw(rows, out.with_suffix(".svg"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int, nargs="?", default=200)
    parser.add_argument("--backbone", default=str(BACKBONE))
    parser.add_argument("--e2e", type=Path, help="A folder with train, valid and test; else the sample inside.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rates", action="store_true", help="Measure the validation loss at every rate instead.")
    parser.add_argument("--out")
    return parser.parse_args()


def drawn(size: int, seed: int, options: argparse.Namespace) -> tuple[list[Example], list[Example], list[Example]]:
    names = ("train.jsonl.gz", "valid.jsonl", "test.jsonl")
    if options.e2e:
        names = ("train.txt.gz", "valid.txt.gz", "test.txt.gz")
    train, valid, test = (read_examples((options.e2e or E2E) / name) for name in names)
    chance = random.Random(seed)
    return chance.sample(train, size), chance.sample(valid, int(0.3 * size)), test


def result(name: str, size: int, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    backbone = load_backbone(options.backbone)
    assert isinstance(backbone, Decoder)
    tokenizer = load_tokenizer(backbone.folder)
    task = load_task("e2e", tokenizer, max_length=256)
    train, valid, test = drawn(size, seed, options)
    encoded, held_out = encode_examples(task, tokenizer, train), encode_examples(task, tokenizer, valid)
    arm = make(name, backbone, [*encoded[0].prompt, *encoded[0].target], seed)
    batches = TrainingBatches(encoded, batch_size=BATCH, seed=seed)
    loss = fit(arm, backbone, batches, held_out, rate, options.steps)
    bleu = float("nan")
    if not options.rates:
        groups = evaluation.grouped(test, TESTS if options.steps > 10 else 2)
        with torch.no_grad():
            written = evaluation.write(backbone, task, tokenizer, groups, arm.received(), max_new_tokens=60)
        bleu = evaluation.scores(written)["bleu"]
    return {"arm": name, "size": size, "seed": seed, "rate": rate, "validation": round(loss, 4), "bleu": round(bleu, 2)}


def make(name: str, backbone: Decoder, words: list[int], seed: int) -> Arm:
    if name.startswith("prefix"):
        start = initialization.from_text(backbone, words, LENGTH)
        if "random" in name:
            start = initialization.random_like(backbone, words, LENGTH, seed)
        assert isinstance(start, KeyValuePrefix)
        method = PrefixTuning(start)
        return Arm(list(method.parameters()), method)
    if name == "LoRA":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
        inject_adapter_in_model(config, backbone.model)
        return Arm([weight for key, weight in backbone.model.named_parameters() if "lora_" in key])
    return Arm(list(backbone.model.requires_grad_(True).parameters()))


def fit(arm: Arm, backbone: Decoder, batches: TrainingBatches, held_out: list[Any], rate: float, steps: int) -> float:
    """Train, and leave the parameters of the best of four validations in place; its loss in nats a token."""
    optimizer = torch.optim.AdamW(arm.parameters, lr=rate, weight_decay=0.0)
    best, best_loss = [parameter.detach().clone() for parameter in arm.parameters], float("inf")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = batches.batch(step)
        (next_token(backbone, batch, arm.received()) / batch.target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(arm.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 4) == 0:
            with torch.no_grad():
                loss = mean_loss(backbone, held_out, arm.received(), 32, next_token, collate)
            if loss < best_loss:
                best, best_loss = [parameter.detach().clone() for parameter in arm.parameters], loss
    for parameter, kept in zip(arm.parameters, best, strict=True):
        parameter.data.copy_(kept)
    return best_loss


def scores(rows: list[dict[str, Any]], arm: str, size: int) -> list[float]:
    return [row["bleu"] for row in rows if (row["arm"], row["size"]) == (arm, size)]


def table(rows: list[dict[str, Any]]) -> str:
    sizes = sorted({row["size"] for row in rows})
    lines = [f"| BLEU | {' | '.join(map(str, sizes))} |", "|---" * (1 + len(sizes)) + "|"]
    for arm in RATES:
        cells = []
        for size in sizes:
            found = scores(rows, arm, size)
            spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.1f}{spread}" if found else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A curve for each arm: the mean BLEU by the number of examples, in a band of one standard deviation."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prefixkit"  # the same rows, the same bytes
    sizes = sorted({row["size"] for row in rows})
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for arm in RATES:
        each = {size: found for size in sizes if (found := scores(rows, arm, size))}
        means = [mean(found) for found in each.values()]
        spreads = [stdev(found) if len(found) > 1 else 0.0 for found in each.values()]
        low, high = zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True)
        (line,) = axes.plot(list(each), means, marker="o", label=arm)
        axes.fill_between(list(each), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="examples of E2E", ylabel="test BLEU", xscale="log", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
