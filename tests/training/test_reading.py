"""What a head makes of a batch: the same alone as among longer ones, and its loss against the formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.load import load_backbone
from prefixkit.data.answered import COLLATE, encode_answered
from prefixkit.data.labelled import LabelledExample
from prefixkit.errors import InputError
from prefixkit.format.manifest import TaskRecord
from prefixkit.injections import TaskHead, joined, parts_of
from prefixkit.task import load_task, load_tokenizer
from prefixkit.training.reading import answer_loss, answers, main_score, named, outputs_of, scores_of
from tests.architectures import tiny
from tests.encoders import encoder_folder
from tests.ragged import random_prefix
from tests.small_tokenizer import END, write_folder

TEXTS = ("pub", "Blue Spice is a pub by the riverside .", "The Eagle is a coffee shop")
EXAMPLES: dict[str, list[LabelledExample]] = {
    "label": [LabelledExample({"text": text}, "ab"[index % 2]) for index, text in enumerate(TEXTS)],
    "tags": [LabelledExample({"tokens": text.split()}, ("a",) * len(text.split())) for text in TEXTS],
    "choice": [
        LabelledExample({"text": "It is", "choices": ("a", text, "near")[: 2 + index % 2]}, 1)
        for index, text in enumerate(TEXTS)
    ],
    "span": [LabelledExample({"question": "What ?", "context": text}, ((text[:2], 0),)) for text in TEXTS],
}
NAMES = {"label": "classification", "tags": "tagging", "choice": "multiple-choice", "span": "question-answering"}
ANSWERS = tuple(EXAMPLES)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder: Path = tmp_path_factory.mktemp("backbone") / request.param
    if request.param == "bert":
        return load_backbone(encoder_folder("bert", folder))
    tiny("gpt2").save_pretrained(folder)
    return load_backbone(write_folder(folder, tokenizer_config={"bos_token": END, "eos_token": END}))


def task_of(answer: str, backbone: Backbone) -> TaskRecord:
    tokenizer = load_tokenizer(backbone.folder)
    task = load_task(NAMES[answer], tokenizer, max_length=48, kind=backbone.kind)
    return replace(task, labels=("a", "b")) if answer in ("label", "tags") else task


def given(answer: str, backbone: Backbone) -> Any:
    generator = torch.Generator().manual_seed(0)
    outputs = {"choice": 1}.get(answer, 2)
    one = "last" if backbone.kind == "decoder" else "first"
    head = TaskHead(
        weight=torch.randn(outputs, 64, generator=generator),
        bias=torch.randn(outputs, generator=generator),
        reads="each" if answer in ("tags", "span") else one,
    )
    prefix = random_prefix(backbone.model)
    prefix = prefix if backbone.kind == "decoder" else replace(prefix, stack="encoder")
    return joined((*parts_of(prefix), head))


def rows_of(answer: str, backbone: Backbone) -> list[Any]:
    return encode_answered(task_of(answer, backbone), load_tokenizer(backbone.folder), EXAMPLES[answer])


@torch.no_grad()
@pytest.mark.parametrize("answer", ANSWERS)
def test_padding_changes_nothing(answer: str, backbone: Backbone) -> None:
    received, rows, collate = given(answer, backbone), rows_of(answer, backbone), COLLATE[answer]
    assert len({len(row) for row in rows}) == 3
    together = answer_loss(backbone, collate(rows), received).item()
    alone = [answer_loss(backbone, collate([row]), received).item() for row in rows]
    assert together == pytest.approx(sum(alone), rel=1e-4, abs=1e-4)
    batch = collate(rows)
    scores = batch.scores(outputs_of(backbone, batch, received))
    for index, row in enumerate(rows):
        single = collate([row])
        wanted = single.scores(outputs_of(backbone, single, received))[0]
        found = scores[index]
        # Of tags the first dimension is that of tokens, of spans the last one is.
        found = found[: len(row)] if answer == "tags" else found[..., : wanted.shape[-1]]
        assert torch.allclose(found, wanted, atol=1e-4)
    every = answers(backbone, rows, received, collate, batch_size=2)
    assert every == [answers(backbone, [row], received, collate)[0] for row in rows]


@torch.no_grad()
def test_the_loss_of_choices_is_over_those_of_each_example(backbone: Backbone) -> None:
    received, rows = given("choice", backbone), rows_of("choice", backbone)
    head = next(part for part in parts_of(received) if isinstance(part, TaskHead))
    total = 0.0
    for row in rows:
        logits = []
        for ids in row.ids:
            states = backbone.states(
                {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}, received
            )
            state = states[0, -1 if backbone.kind == "decoder" else 0]
            logits.append(float(head.weight[0] @ state + head.bias[0]))
        total -= float(F.log_softmax(torch.tensor(logits), dim=0)[row.label])
    assert answer_loss(backbone, COLLATE["choice"](rows), received).item() == pytest.approx(total, rel=1e-4)


@torch.no_grad()
def test_the_loss_of_spans_is_over_the_texts_tokens_and_the_first(backbone: Backbone) -> None:
    received, rows = given("span", backbone), rows_of("span", backbone)
    total = 0.0
    for row in rows:
        single = COLLATE["span"]([row])
        outputs = outputs_of(backbone, single, received)[0]
        places = [index for index, (begin, end) in enumerate(row.places) if begin < end or index == 0]
        for side, label in enumerate(row.span):
            total -= float(F.log_softmax(outputs[places, side], dim=0)[places.index(label)])
    assert answer_loss(backbone, COLLATE["span"](rows), received).item() == pytest.approx(total, rel=1e-4)


def test_a_prefix_without_a_head_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="expected a task head"):
        outputs_of(backbone, COLLATE["label"](rows_of("label", backbone)), None)


@pytest.mark.parametrize(
    ("answer", "chosen", "wanted", "scores"),
    [
        ("label", [[0], [1], [1]], ["a", "b", "b"], {"accuracy": 200 / 3, "macro_f1": 200 / 3}),
        ("choice", [[1], [0], [1]], [1, 0, 1], {"accuracy": 200 / 3}),
        ("span", [[0, 3], [0, 0], [0, 2]], ["pub", "", "Th"], {"f1": 100 / 3, "exact_match": 100 / 3}),
    ],
)
def test_numbers_become_answers_and_scores(
    answer: str, chosen: list[list[int]], wanted: list[Any], scores: dict[str, float], backbone: Backbone
) -> None:
    task, examples = task_of(answer, backbone), EXAMPLES[answer]
    assert named(task, examples, chosen) == wanted
    assert scores_of(task, examples, chosen) == {name: pytest.approx(value) for name, value in scores.items()}
    assert main_score(task, examples, chosen) == next(iter(scores_of(task, examples, chosen).values()))


def test_words_that_did_not_fit_get_the_first_label(backbone: Backbone) -> None:
    task, example = task_of("tags", backbone), LabelledExample({"tokens": ("x",) * 4}, ("a", "b", "a", "b"))
    assert named(task, [example], [[1, 1]]) == [["b", "b", "a", "a"]]
    assert scores_of(task, [example], [[1, 1]])["accuracy"] == 50.0
