"""How much of a document's worth a cartridge of 48 slots keeps: nats an answer token, over questions it never saw.

    python examples/cartridge_of_records.py [STEPS] [--backbone DIR] [--documents N]

A document is 384 tokens of records, `The Golden Fox : salmon`, in random order. A question shows a few records in an
order of its own and asks for the next one's value. No question of the test was trained on, so that what is tested is
what the cartridge keeps of the document. The backbone with the whole document before the question is the teacher in
training and one end of the scale; the backbone with nothing but its BOS is the other.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import mkdtemp

import torch

from prefixkit import TrainConfig, load_backbone, train
from prefixkit.backbones.decoder import Decoder
from prefixkit.data.batches import EncodedExample, collate
from prefixkit.injections import KeyValuePrefix, injection, part_of
from prefixkit.quickstart import BACKBONE
from prefixkit.task import ModelTokenizer, load_tokenizer
from prefixkit.training.config import OptimizerConfig, method_settings

LENGTH, TOKENS = 48, 384
NAMES = "Golden Silver Red Old Quiet Royal Green Happy Wild Crystal Little Great"
PLACES = "Fox Lion Mill Bridge Tower Oak Crown Star King Swan Anchor Castle Phoenix Plough Rose Bear"
DISHES = """bread cheese wine beer milk honey salt sugar butter eggs fish meat corn rice apples pears plums grapes figs
nuts tea coffee soup beef lamb pork duck goose trout salmon oil flour beans peas leeks onions herbs jam cream oats"""


@dataclass
class Document:
    """Records, and questions about them: what is shown, and the value to give."""

    records: list[str]
    questions: list[tuple[str, str]]
    held_out: list[tuple[str, str]]


def main() -> None:
    options = parse()
    backbone = load_backbone(options.backbone)
    assert isinstance(backbone, Decoder)
    tokenizer, folder = load_tokenizer(backbone.folder), Path(mkdtemp())
    rows = []
    for seed in range(options.first, options.first + options.documents):
        made = document(seed, tokenizer, options.questions)
        rows.append(measured(made, backbone, tokenizer, folder, options))
        print("  ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    print(table(rows, options.steps))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int, nargs="?", default=100)
    parser.add_argument("--backbone", default=str(BACKBONE))
    parser.add_argument("--documents", type=int)
    parser.add_argument("--first", type=int, default=0, help="The seed of the first document.")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--top", type=int, default=8192, help="Of the teacher's likeliest tokens; all of them.")
    options = parser.parse_args()
    if options.documents is None:
        options.documents = 5 if options.steps > 10 else 1
    return options


def document(seed: int, tokenizer: ModelTokenizer, questions: int) -> Document:
    chance = random.Random(seed)
    names = [f"The {first} {second}" for first in NAMES.split() for second in PLACES.split()]
    chance.shuffle(names)
    records: list[str] = []
    for name in names:
        record = f"{name} : {chance.choice(DISHES.split())}"
        if len(tokenizer.encode_text("\n".join([*records, record]))) >= TOKENS:
            break
        records.append(record)
    asked = {question(records, chance, shown) for shown in (0, 1, 2, 3) for _ in range(questions)}
    # Every record is asked for in both parts; no question is.
    several = sorted(pair for pair in asked if "\n" in pair[0])
    chance.shuffle(several)
    held_out = several[: 4 * len(records)]
    return Document(records, sorted(asked - set(held_out)), held_out)


def question(records: Sequence[str], chance: random.Random, shown: int) -> tuple[str, str]:
    *before, last = chance.sample(records, shown + 1)
    name, dish = last.split(" : ")
    return "".join(f"{record}\n" for record in before) + f"{name} :", f" {dish}"


def measured(
    made: Document, backbone: Decoder, tokenizer: ModelTokenizer, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    (folder / "document.txt").write_text("\n".join(made.records) + "\n")
    lines = [json.dumps({"input": shown, "target": value}) for shown, value in made.questions]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    bos = tokenizer.bos_id
    assert bos is not None
    whole = [bos, *tokenizer.encode_text("\n".join(made.records) + "\n")]
    arms: dict[str, KeyValuePrefix] = {
        "nothing": backbone.key_values_of([bos]),
        "document": backbone.key_values_of(whole),
        "first 48 tokens": backbone.key_values_of(whole[:LENGTH]),
    }
    for name, init in (("cartridge", "document"), ("from random", "random")):
        arms[name] = fitted(init, folder, options)
    return {name: nats(backbone, tokenizer, made.held_out, prefix) for name, prefix in arms.items()}


def fitted(init: str, folder: Path, options: argparse.Namespace) -> KeyValuePrefix:
    settings = {"name": "cartridge", "length": LENGTH, "init": init, "document": str(folder / "document.txt")}
    settings["top"] = options.top
    prefix = train(
        TrainConfig(
            backbone=options.backbone,
            data=str(folder / "questions.jsonl"),
            output=str(folder / "cartridge.safetensors"),
            # The document holds the BOS; a start of random numbers has none to promise.
            task="continuation" if init == "document" else str(unpromised(folder)),
            steps=options.steps,
            method=method_settings(settings),
            optimizer=OptimizerConfig(lr=options.lr),
        )
    )
    made = part_of(injection(prefix), KeyValuePrefix)
    assert made is not None
    return made


def unpromised(folder: Path) -> Path:
    path = folder / "open.toml"
    path.write_text('bos = "none"\ninput_template = "{input}"\nseparator = ""\n')
    return path


@torch.no_grad()
def nats(
    backbone: Decoder, tokenizer: ModelTokenizer, questions: Sequence[tuple[str, str]], prefix: KeyValuePrefix
) -> float:
    rows = [
        EncodedExample(tuple(tokenizer.encode_text(shown)), tuple(tokenizer.encode_text(value)))
        for shown, value in questions
    ]
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        logits = backbone.target_logits(batch.input_ids, batch.attention_mask, batch.labels, prefix)
        right = batch.labels[batch.labels != -100]
        total += torch.nn.functional.cross_entropy(logits.float(), right, reduction="sum").item()
        tokens += len(right)
    return total / tokens


def table(rows: list[dict[str, float]], steps: int) -> str:
    names = [name for name in rows[0] if name not in ("nothing", "document")]
    lines = [f"| document | nothing | all of it | gap | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    shares: dict[str, list[float]] = {name: [] for name in names}
    for number, row in enumerate(rows, 1):
        gap = row["nothing"] - row["document"]
        told = []
        for name in names:
            shares[name].append(100 * (row["nothing"] - row[name]) / gap)
            told.append(f"{row[name]:.3f} ({shares[name][-1]:.0f} %)")
        lines.append(f"| {number} | {row['nothing']:.3f} | {row['document']:.3f} | {gap:.3f} | {' | '.join(told)} |")
    means = [f"{mean(each):.0f} %" + (f" ± {stdev(each):.0f}" if len(each) > 1 else "") for each in shares.values()]
    return "\n".join([*lines, f"| mean | | | | {' | '.join(means)} |", "", f"{steps} steps each."])


if __name__ == "__main__":
    main()
