"""Null prompts (Logan et al. 2022) as text: the fields and the mask, and nothing else; beside them manual patterns.

The templates are those of the paper's code. RoBERTa's mask takes the space before it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixkit.task import ModelTokenizer, encode_prompt, encode_target, load_task, load_tokenizer
from tests.encoders import encoder_folder

NULL = {
    "BoolQ": ("{passage} {question}{mask}", "<s>Pubs close. do pubs close<mask></s>"),
    "CB, RTE, MNLI": ("{premise}{mask} {hypothesis}", "<s>It rains.<mask> It is wet.</s>"),
    "MRPC, QQP, WNLI": ("{sentence1} {sentence2}{mask}", "<s>A pub. An inn.<mask></s>"),
    "QNLI": ("{question}{mask} {sentence}", "<s>do pubs close<mask> A pub.</s>"),
    "SST-2": ("{sentence}{mask}", "<s>A pub.<mask></s>"),
    "WiC": ("{sentence1} {sentence2} {word}{mask}", "<s>A pub. An inn. pub<mask></s>"),
}
MANUAL = {
    "SST-2": ("{sentence} It was{mask} .", "<s>A pub. It was<mask> .</s>"),
    "BoolQ": (
        "{passage} . Question : {question} ? Answer :{mask} .",
        "<s>Pubs close. . Question : do pubs close ? Answer :<mask> .</s>",
    ),
    "CB, RTE, MNLI": ("{premise} ?{sep}{mask} , {hypothesis}", "<s>It rains. ?</s><mask> , It is wet.</s>"),
    "MRPC, QQP": (
        "{sentence1} and {sentence2} have{mask} meanings .",
        "<s>A pub. and An inn. have<mask> meanings .</s>",
    ),
    "WiC": (
        "{sentence1} {sentence2} Does {word} have the same meaning in both sentences ?{mask}",
        "<s>A pub. An inn. Does pub have the same meaning in both sentences ?<mask></s>",
    ),
}
FIELDS = {
    "passage": "Pubs close.",
    "question": "do pubs close",
    "premise": "It rains.",
    "hypothesis": "It is wet.",
    "sentence": "A pub.",
    "sentence1": "A pub.",
    "sentence2": "An inn.",
    "word": "pub",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return load_tokenizer(encoder_folder("roberta", tmp_path_factory.mktemp("roberta")))


@pytest.mark.parametrize(("template", "golden"), [*NULL.values(), *MANUAL.values()])
def test_what_the_model_reads(tokenizer: ModelTokenizer, tmp_path: Path, template: str, golden: str) -> None:
    file = tmp_path / "task.toml"
    file.write_text(f'input_template = "{{cls}}{template}"\ntarget_template = " {{target}}"\n')
    task = load_task(file, tokenizer, max_length=200, kind="encoder")
    asked = {name: text for name, text in FIELDS.items() if f"{{{name}}}" in template}
    ids = encode_prompt(task, tokenizer, asked)
    told = tokenizer.decode(ids)
    for name, usual in (("cls_token", "<s>"), ("sep_token", "</s>"), ("mask_token", "<mask>")):
        told = told.replace(tokenizer.special_tokens[name], usual)
    assert told == golden
    assert ids.count(tokenizer.named_id("mask_token") or 0) == 1
    assert encode_target(task, tokenizer, "a") == tokenizer.encode_text(" a")
