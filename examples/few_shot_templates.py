"""Sixteen examples of a class, 90 to be told: three templates, each as it is, with BitFit, and with everything trained.

A null prompt is nothing but the text (Logan et al. 2022); a pattern asks for the word that stands for a label, as PET
does (Schick & Schütze 2021); demonstrations put an answered example of each class before it, as LM-BFF does (Gao et al.
2021). What is trained is BitFit's biases, one file, or the whole model, which PET and LM-BFF train and leaves no file.

    null            as it is  40.0   BitFit  97.8   all of it  98.9
    pattern         as it is  72.2   BitFit 100.0   all of it 100.0
    demonstrations  as it is  41.1   BitFit  72.2   all of it  93.3

Run it from anywhere: `python few_shot_templates.py [STEPS [TESTS OF EACH CLASS]]`.
"""

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from prefixkit import TrainConfig
from prefixkit.cli.training_display import progress_of
from prefixkit.injections import Injection, injection
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.task import load_tokenizer
from prefixkit.training import loop
from prefixkit.training.config import OptimizerConfig, method_settings
from prefixkit.training.preparation import Prepared, prepare
from prefixkit.training.scoring import Scoring, score

LABELS = ("pub", "restaurant", "coffee shop")
PATTERN = "{text} This place is a"
TEMPLATES = {"null": "{text}", "pattern": PATTERN, "demonstrations": "{demonstrations}" + PATTERN}
TASK = 'input_template = "{template}"\nseparator = ""\ntarget_template = " {{target}}"\n[verbalizer]\n'
SHOTS, TESTS = 16, 30


def main(steps: int = 60, tests: int = TESTS) -> None:
    folder = Path(mkdtemp())
    rows = rows_of(E2E / "train.jsonl.gz", 1 + SHOTS + tests)
    shown, train, test = rows[:3], rows[3 : 3 * (1 + SHOTS)], rows[3 * (1 + SHOTS) :]
    asked = "".join(f"{row['text']} This place is a {row['label']} .\n" for row in shown)
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps({**row, "demonstrations": asked}) for row in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name, template in TEMPLATES.items():
        task = folder / f"{name}.toml"
        task.write_text(TASK.format(template=template) + "".join(f'"{label}" = "{label}"\n' for label in LABELS))
        config = TrainConfig(
            backbone=str(BACKBONE),
            data=str(folder / "train.jsonl"),
            output=str(folder / f"{name}.safetensors"),
            task=str(task),
            steps=steps,
            batch_size=8,
            method=method_settings({"name": "bitfit"}),
            optimizer=OptimizerConfig(lr=3e-3),
        )
        test_data = str(folder / "test.jsonl")
        print(f"{name:15} as it is {accuracy(prepare(config), test_data, None):5.1f}", end="", flush=True)
        trained = injection(loop.train(config))
        print(f"   BitFit {accuracy(prepare(config), test_data, trained):5.1f}", end="", flush=True)
        whole = fine_tuned(prepare(replace(config, steps=steps)), steps)
        print(f"   all of it {accuracy(whole, test_data, None):5.1f}")


def rows_of(path: Path, of_each: int) -> list[dict[str, str]]:
    """As many sentences of each class, taking turns."""
    found: dict[str, list[dict[str, str]]] = {label: [] for label in LABELS}
    with gzip.open(path, "rt") as file:
        for line in file:
            record = json.loads(line)
            facts = dict(fact.split(" : ", 1) for fact in record["input"].strip().split(" | ") if " : " in fact)
            said, kind = record["target"], facts.get("Type", "").strip()
            said = said[0] if isinstance(said, list) else said
            if kind in found and kind in said and len(found[kind]) < of_each:
                found[kind].append({"text": said.strip(), "label": kind})
    return [row for rows in zip(*found.values(), strict=False) for row in rows]


def accuracy(prepared: Prepared, data: str, received: Injection | None) -> float:
    tokenizer = load_tokenizer(prepared.backbone.folder)
    how = Scoring(progress=progress_of)
    return score(prepared.backbone, prepared.task, tokenizer, data, [received], how).metrics["accuracy"]


def fine_tuned(prepared: Prepared, steps: int) -> Prepared:
    """The backbone itself, trained: what the other arms do without."""
    parameters = list(prepared.backbone.model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for step in range(steps):
        batch = prepared.batches.batch(step)
        (prepared.objective(prepared.backbone, batch, None) / batch.target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return prepared


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
