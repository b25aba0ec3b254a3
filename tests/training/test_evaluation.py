"""What a prefix writes: long inputs are cut as in training, and no row depends on its neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefixkit.backbones.decoder import Decoder
from prefixkit.data.batches import encode_examples
from prefixkit.data.readers import Example
from prefixkit.errors import DataError
from prefixkit.task import load_task
from prefixkit.training import evaluation
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import random_prefix
from tests.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer()
EXAMPLES = [
    Example({"input": "name : Blue Spice | " * 400}, "Blue Spice is a pub .", "d.jsonl:1"),
    Example({"input": "name : Eagle"}, "The Eagle .", "d.jsonl:2"),
    Example({"input": "area : riverside | " * 300}, "The riverside .", "d.jsonl:3"),
    Example({"input": "area : riverside | " * 300}, "It is near the riverside .", "d.jsonl:4"),
]


class Listening(Decoder):
    """A decoder that remembers its prompts."""

    heard: list[list[int]]

    def generate(self, prompts, *arguments, **keywords):  # type: ignore[no-untyped-def]
        self.heard = [*getattr(self, "heard", []), *map(list, prompts)]
        return super().generate(prompts, *arguments, **keywords)


def test_long_inputs_are_written_for_as_if_alone() -> None:
    decoder, groups = wrap(tiny("gpt2")), evaluation.grouped(EXAMPLES)
    prefix = random_prefix(decoder.model)
    task = load_task("text", TOKENIZER, max_length=128 - prefix.length)
    together = evaluation.write(decoder, task, TOKENIZER, groups, prefix)
    alone = [evaluation.write(decoder, task, TOKENIZER, [group], prefix)[0] for group in groups]
    assert [one.text for one in together] == [one.text for one in alone]
    assert all(one.text for one in together)


def test_prompts_are_cut_as_in_training() -> None:
    plain = wrap(tiny("gpt2"))
    decoder = Listening(plain.model, plain.folder, plain.identity, plain.geometry)
    task = load_task("text", TOKENIZER, max_length=100)
    trained = encode_examples(task, TOKENIZER, EXAMPLES)
    evaluation.write(decoder, task, TOKENIZER, evaluation.grouped(EXAMPLES), None, max_new_tokens=1)
    # Of two references the longer one decides.
    longer = max((trained[2], trained[3]), key=lambda example: len(example.target))
    assert {tuple(prompt) for prompt in decoder.heard} == {trained[0].prompt, trained[1].prompt, longer.prompt}


def test_a_smaller_context_than_the_tasks_is_kept_to() -> None:
    decoder = wrap(tiny("gpt2"))
    prefix = random_prefix(decoder.model)
    task = load_task("text", TOKENIZER, max_length=1000)
    assert evaluation.within_context(task, decoder, prefix).max_length == 128 - prefix.length
    assert evaluation.within_context(task, decoder, None).max_length == 128
    assert evaluation.within_context(replace(task, max_length=50), decoder, prefix).max_length == 50
    assert evaluation.write(decoder, task, TOKENIZER, evaluation.grouped(EXAMPLES[:1]), prefix)[0].text


def test_a_reference_that_leaves_no_room_is_named() -> None:
    decoder, task = wrap(tiny("gpt2")), load_task("text", TOKENIZER, max_length=100)
    groups = evaluation.grouped([Example({"input": "a"}, "word " * 200, "d.jsonl:7")])
    with pytest.raises(DataError, match=r"d\.jsonl:7: expected at most 100 tokens"):
        evaluation.write(decoder, task, TOKENIZER, groups, None)
