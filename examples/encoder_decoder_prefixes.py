"""E2E with a small frozen T5: each of the three prefixes alone, all of them, prompt tuning, and full fine-tuning.

    python examples/pretrain_encoder_decoder.py TEXT TOKENIZER RECORDS T5 [--vectors DIR]
    python examples/encoder_decoder_prefixes.py T5 E2E > encoder_decoder_prefixes.txt

E2E is the folder of that data set's files, `train`, `valid` and `test`, as Prefix-Tuning read them. With a number of
steps instead, everything is small: one seed, one rate, a T5 of two steps and the sample that comes with prefixkit.

Every arm is trained for equal steps on equal batches. Its rate is the one of three with the lowest validation loss
after a third of the steps, with the first seed. BLEU is of what is written greedily for the first inputs of the test
data.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from comparison import FULL, Arm, spread
from transformers.utils import logging

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.load import load_backbone
from prefixkit.data.batches import collate_pairs
from prefixkit.data.readers import read_examples
from prefixkit.injections import Injection, injection
from prefixkit.quickstart import BACKBONE
from prefixkit.quickstart import E2E as SAMPLE
from prefixkit.task import load_tokenizer
from prefixkit.training import evaluation
from prefixkit.training.config import EvaluationConfig, OptimizerConfig, TrainConfig, method_settings
from prefixkit.training.loop import complete, schedule, set_rates
from prefixkit.training.objectives import next_token, reduced
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.progress import Silence
from prefixkit.training.validation import mean_loss

LENGTH, BATCH = 16, 16
PREFIX = {"name": "prefix-tuning", "length": LENGTH}
RATES = (0.1, 0.3, 1.0)


ARMS = (
    Arm("prefix, encoder", {**PREFIX, "stacks": "encoder.self"}, RATES),
    Arm("prefix, decoder", {**PREFIX, "stacks": "decoder.self"}, RATES),
    Arm("prefix, cross-attention", {**PREFIX, "stacks": "decoder.cross"}, RATES),
    Arm("prefixes, all three", PREFIX, RATES),
    Arm("prompt tuning", {"name": "prompt-tuning", "length": LENGTH}, (0.3, 1.0, 3.0)),
    Arm(FULL, PREFIX, (1e-3, 3e-3, 1e-2)),
)


@dataclass(frozen=True)
class Comparison:
    """A backbone, its data, and how long to train."""

    backbone: str
    training: str
    validation: str
    test: str
    steps: int
    seeds: int
    inputs: int
    folder: str

    def prepared(self, arm: Arm, rate: float, seed: int, steps: int) -> Prepared:
        """The run of `arm` at `rate`, at its start."""
        config = TrainConfig(
            backbone=self.backbone,
            data=self.training,
            eval_data=self.validation,
            output=f"{self.folder}/prefix.safetensors",
            task="e2e",
            steps=steps,
            batch_size=BATCH,
            seed=seed,
            device="cpu",
            method=method_settings(arm.method),
            optimizer=OptimizerConfig(lr=rate, warmup_steps=steps // 10),
            evaluation=EvaluationConfig(every=steps, limit=128 if steps > 10 else 8),
        )
        return prepare(config, load_backbone(self.backbone))


@dataclass(frozen=True)
class Run:
    """One run: its rate, how many numbers it trained, nats a token of validation data, and BLEU if it was asked for."""

    rate: float
    trained: int
    loss: float
    bleu: float = float("nan")


def main(given: str = "", e2e: str = "", steps: str = "600", inputs: str = "300") -> None:
    logging.disable_progress_bar()
    quick, folder = given.isdigit(), mkdtemp()
    for path in (
        () if quick else (Path(given, "config.json"), *(Path(e2e, f"{part}.txt.gz") for part in ("train", "test")))
    ):
        if not path.is_file():
            sys.exit(f"{path}: expected a file; found none; next: name both folders, as {__file__} begins with")
    whole = Comparison(
        backbone=pretrained(folder) if quick else given,
        training=str(SAMPLE / "train.jsonl.gz") if quick else eighth(e2e, folder),
        validation=str(SAMPLE / "valid.jsonl" if quick else Path(e2e, "valid.txt.gz")),
        test=str(SAMPLE / "test.jsonl" if quick else Path(e2e, "test.txt.gz")),
        steps=int(given if quick else steps),
        seeds=1 if quick else 3,
        inputs=4 if quick else int(inputs),
        folder=folder,
    )
    for line in table(whole, [replace(arm, rates=arm.rates[1:2]) for arm in ARMS] if quick else ARMS):
        print(line, flush=True)


def pretrained(folder: str) -> str:
    """A T5 of two steps."""
    script, out = Path(__file__).with_name("pretrain_encoder_decoder.py"), f"{folder}/t5"
    words = [sys.executable, script, __file__, BACKBONE / "tokenizer.json", "", out, "--steps", "2"]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    return out


def eighth(e2e: str, folder: str) -> str:
    """Every eighth line of the training data: more than these runs read, and sooner encoded."""
    path = Path(folder, "train.txt.gz")
    with gzip.open(Path(e2e, "train.txt.gz"), "rt", encoding="utf-8") as lines:
        path.write_bytes(gzip.compress("".join(list(lines)[::8]).encode()))
    return str(path)


def table(whole: Comparison, arms: Any) -> Iterator[str]:
    """The rows of a Markdown table, as they come."""
    yield "| what is trained | numbers | rate | validation, nats a token | test BLEU | by seed |"
    yield "|---|---|---|---|---|---|"
    nothing = whole.prepared(arms[0], 1.0, 0, 1)
    bare = Run(0.0, 0, _loss(nothing, None), bleu(whole, nothing, None))
    yield f"| nothing | 0 | | {bare.loss:.2f} | {bare.bleu:.1f} | |"
    for arm in arms:
        runs = list(best_rate(whole, arm))
        edge = " (edge)" if len(arm.rates) > 1 and runs[0].rate in (min(arm.rates), max(arm.rates)) else ""
        losses, bleus = [run.loss for run in runs], [run.bleu for run in runs]
        scores = f"{spread(losses, 2)} | {spread(bleus, 1)} | {', '.join(f'{one:.1f}' for one in bleus)}"
        yield f"| {arm.name} | {runs[0].trained:,} | {runs[0].rate:g}{edge} | {scores} |"


def best_rate(whole: Comparison, arm: Arm) -> Iterator[Run]:
    """The runs of all seeds at the rate with the lowest validation loss after a third of the steps."""
    rate, few = arm.rates[0], max(1, whole.steps // 3)
    if len(arm.rates) > 1:
        rate = min(arm.rates, key=lambda tried: train(whole, arm, tried, 0, few).loss)
    for seed in range(whole.seeds):
        yield train(whole, arm, rate, seed, whole.steps, scored=True)


def train(whole: Comparison, arm: Arm, rate: float, seed: int, steps: int, *, scored: bool = False) -> Run:
    """Train once, and score what is written where that is asked for."""
    prepared = whole.prepared(arm, rate, seed, steps)
    received, trained = None, sum(weight.numel() for weight in prepared.method.parameters())
    if arm.name == FULL:
        trained = fine_tune(prepared)
    else:
        received = injection(complete(prepared, resume=False, listener=Silence()))
    run = Run(rate, trained, _loss(prepared, received))
    if scored:
        run = replace(run, bleu=bleu(whole, prepared, received))
    told = f"{arm.name}, rate {rate:g}, seed {seed}, {steps} steps: {run.loss:.3f} nats, BLEU {run.bleu:.2f}"
    print(told, file=sys.stderr, flush=True)
    return run


def fine_tune(prepared: Prepared) -> int:
    """Train the backbone itself; gives the number of its parameters."""
    model = prepared.backbone.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=prepared.config.optimizer.lr or 0.0, weight_decay=0.0)
    for number in range(prepared.total_steps):
        set_rates(optimizer, schedule(number, prepared))
        batch = prepared.batches.batch(number)
        total = prepared.objective(prepared.backbone, batch, None)
        reduced(total, how="mean", tokens=batch.target_tokens, examples=batch.examples).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    return sum(weight.numel() for weight in model.parameters())


def _loss(prepared: Prepared, received: Injection | None) -> float:
    backbone: Backbone = prepared.backbone
    return mean_loss(backbone, prepared.validation, received, 64, next_token, collate_pairs)


def bleu(whole: Comparison, prepared: Prepared, received: Injection | None) -> float:
    """Of what is written for the first inputs, against all their references."""
    backbone = prepared.backbone
    groups = evaluation.grouped(read_examples(whole.test), whole.inputs)
    tokenizer = load_tokenizer(backbone.folder)
    written = evaluation.write(backbone, prepared.task, tokenizer, groups, received, max_new_tokens=64, batch_size=75)
    for one in written[:2]:
        print(f"    {one.group.fields['input']}\n        {one.text}", file=sys.stderr)
    return evaluation.scores(written)["bleu"]


if __name__ == "__main__":
    main(*sys.argv[1:])
