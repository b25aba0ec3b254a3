"""E2E test BLEU of every way to adapt one frozen model, at equal processor time. Run from the root of the project:

    python -m tests.bench.e2e --data E2E_FOLDER --backbone gpt2-8m --arm prefix --minutes 10 --out results.jsonl

`--minutes` are minutes of this machine's `--threads` cores, counted as processor time, so that a busy machine takes
longer but trains no less; validation is not counted. The learning rate decays linearly over that time. The parameters
with the best validation loss are kept; the test set is read once, at the end. One line of JSON is appended to `--out`.

Arms: `none` (the bare model), `prefix` (our defaults), `random` (the same from a random start), `lora` (PEFT, rank 8 on
every attention projection), `full` (full fine-tuning, which is exempt from the frozen law), and `one-template` and
`two-sentences`, fixed templates that use no model at all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.load import load_backbone
from prefixkit.data.batches import EncodedExample, TrainingBatches, collate, encode_examples
from prefixkit.data.readers import read_examples
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods import initialization
from prefixkit.methods.prefix_tuning import PrefixTuning, Settings
from prefixkit.task import load_task, load_tokenizer
from prefixkit.training import evaluation
from prefixkit.training.metrics import generation_scores
from prefixkit.training.objectives import next_token
from prefixkit.training.validation import mean_loss
from tests.bench.e2e_templates import TEMPLATES

VALIDATIONS = 8
VALIDATION_EXAMPLES = 256


@dataclass
class Arm:
    """What is trained, at which learning rate, and what the backbone receives."""

    parameters: list[torch.nn.Parameter]
    lr: float
    injection: Callable[[], KeyValuePrefix | None] = lambda: None


def make(name: str, backbone: Decoder, words: list[int], length: int, seed: int) -> Arm:
    """The arm called `name`. Learning rates other than ours were chosen on validation loss: see RESULTS.md."""
    torch.manual_seed(seed)
    if name in ("prefix", "random"):
        text = name == "prefix"
        start = (
            initialization.from_text(backbone, words, length)
            if text
            else initialization.random_like(backbone, words, length, seed)
        )
        method = PrefixTuning(start)
        return Arm(list(method.parameters()), Settings().default_lr, method)
    if name == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
        inject_adapter_in_model(config, backbone.model)
        named = backbone.model.named_parameters()
        return Arm([parameter for key, parameter in named if "lora_" in key], 1e-2)
    backbone.model.requires_grad_(name == "full")
    return Arm([*backbone.model.parameters()] if name == "full" else [], 1e-3)


def fit(
    arm: Arm, backbone: Decoder, batches: TrainingBatches, validation: list[EncodedExample], seconds: float
) -> dict[str, float]:
    """Train `arm` for `seconds` of processor time; the best validation's parameters are in place afterwards."""
    optimizer = torch.optim.AdamW(arm.parameters, lr=arm.lr, weight_decay=0.0)
    best, best_loss, best_step, due = None, float("inf"), 0, 1
    began, step, tokens = time.process_time(), 0, 0  # `began` moves on by what validation takes
    while due <= VALIDATIONS:
        spent = min(1.0, (time.process_time() - began) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * (1 - spent)
        batch = batches.batch(step)
        (next_token(backbone, batch, arm.injection()) / batch.target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(arm.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + batch.tokens
        if spent * VALIDATIONS >= due:
            due, paused = due + 1, time.process_time()
            with torch.no_grad():
                loss = mean_loss(backbone, validation, arm.injection(), 64, next_token, collate)
            began += time.process_time() - paused
            print(f"{spent:4.0%} step {step} validation {loss:.4f}", flush=True)
            if loss < best_loss:
                best = [parameter.detach().clone() for parameter in arm.parameters]
                best_loss, best_step = loss, step
    for parameter, kept in zip(arm.parameters, best or [], strict=True):
        parameter.data.copy_(kept)
    return {"validation_loss": best_loss, "best_step": best_step, "steps": step, "tokens": tokens}


def model_arm(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train and score one arm that uses the model."""
    backbone = load_backbone(options.backbone)
    tokenizer = load_tokenizer(backbone.folder)
    task = load_task("e2e", tokenizer, max_length=256)
    train = encode_examples(task, tokenizer, read_examples(options.data / "train.txt.gz"))
    held_out = read_examples(options.data / "valid.txt.gz")
    words = [*train[0].prompt, *train[0].target]
    arm = make(options.arm, backbone, words, options.length, options.seed)
    arm.lr = options.lr or arm.lr
    told: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in arm.parameters), "lr": arm.lr}
    began = time.process_time()
    if arm.parameters:
        batches = TrainingBatches(train, batch_size=16, seed=options.seed)
        validation = encode_examples(task, tokenizer, held_out[:: max(1, len(held_out) // VALIDATION_EXAMPLES)])
        told |= fit(arm, backbone, batches, validation, options.minutes * 60 * options.threads)
    told["processor_seconds"] = round(time.process_time() - began)
    with torch.no_grad():
        prefix = arm.injection()
    for split in options.splits:
        groups = evaluation.grouped(read_examples(options.data / f"{split}.txt.gz"), options.limit)
        for beams in options.beams:
            written = evaluation.write(backbone, task, tokenizer, groups, prefix, num_beams=beams, batch_size=64)
            yield {**told, "split": split, "inputs": len(groups), "beams": beams, **evaluation.scores(written)}


def template_arm(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Score a fixed template."""
    for split in options.splits:
        groups = evaluation.grouped(read_examples(options.data / f"{split}.txt.gz"), options.limit)
        texts = [TEMPLATES[options.arm](str(group.fields["input"])) for group in groups]
        references = [group.references for group in groups]
        yield {"split": split, "inputs": len(groups), **generation_scores(texts, references)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--arm", default="prefix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--beams", type=int, nargs="+", default=[5])
    parser.add_argument("--splits", nargs="+", default=["valid", "test"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = template_arm(options) if options.arm in TEMPLATES else model_arm(options)
    for row in rows:
        line = json.dumps({"arm": options.arm, "seed": options.seed, "minutes": options.minutes, **row})
        print(line, flush=True)
        with options.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
