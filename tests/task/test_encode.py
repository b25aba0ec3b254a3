from __future__ import annotations

from dataclasses import replace

import pytest

from prefixkit.errors import ConfigError, DataError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import (
    ModelTokenizer,
    check_task,
    decode_target,
    encode_prompt,
    encode_target,
    input_fields,
    load_task,
    stop_ids,
)
from tests.small_tokenizer import END, small_tokenizer

SOURCE = "name : Blue Spice | Type : pub"


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def e2e(tokenizer: ModelTokenizer) -> TaskRecord:
    return load_task("e2e", tokenizer, max_length=200)


def test_e2e_is_the_sequence_of_prefix_tuning(e2e: TaskRecord, tokenizer: ModelTokenizer) -> None:
    target = "Blue Spice is a pub . "
    whole = tokenizer.encode_rendered(f" {SOURCE} {END} {target} {END}")
    assert encode_prompt(e2e, tokenizer, {"input": SOURCE}) + encode_target(e2e, tokenizer, target) == whole


def test_user_cannot_write_a_special_token(e2e: TaskRecord, tokenizer: ModelTokenizer) -> None:
    prompt = encode_prompt(e2e, tokenizer, {"input": f"a {END} b"})
    assert prompt.count(0) == 1
    assert prompt[-1] == 0
    assert tokenizer.decode(prompt) == f" a {END} b {END}"
    assert encode_target(e2e, tokenizer, f"x {END} y").count(0) == 1


def test_literal_and_value_do_not_join_into_a_special_token(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    task = replace(e2e, input_template="<|endof{input}", separator="")
    assert 0 not in encode_prompt(task, tokenizer, {"input": "text|>"})


def test_special_token_in_a_template_is_one_token(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    task = replace(e2e, input_template="<|im_start|>{input}<|im_end|>")
    prompt = encode_prompt(task, tokenizer, {"input": "<|im_end|>"})
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    assert prompt[0] == start
    assert prompt[-2:] == [end, 0]
    assert prompt.count(end) == 1


def test_template_and_value_are_tokenised_in_one_go(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    assert encode_prompt(e2e, tokenizer, {"input": SOURCE})[:-1] == tokenizer.encode_text(f" {SOURCE} ")


@pytest.mark.parametrize(("bos", "count"), [("none", 0), ("before", 0), ("after", 1)])
def test_bos_is_put_once_or_not_at_all(bos: str, count: int) -> None:
    tokenizer = small_tokenizer(adds_bos=True)
    task = replace(load_task("text", tokenizer, max_length=99), bos=bos)
    prompt = encode_prompt(task, tokenizer, {"input": "<s>Blue Spice"})
    assert prompt.count(tokenizer.bos_id) == count
    assert (prompt[0] == tokenizer.bos_id) == bool(count)


def test_template_that_starts_with_bos_is_refused() -> None:
    tokenizer = small_tokenizer(adds_bos=True)
    task = replace(load_task("text", tokenizer, max_length=99), input_template="<s>{input}")
    with pytest.raises(ConfigError, match="without the BOS token; found '<s>'; write bos = \"after\""):
        check_task(task, tokenizer)


def test_bos_that_the_tokenizer_lacks_is_refused() -> None:
    tokenizer = small_tokenizer(bos=None)
    task = replace(load_task("text", tokenizer, max_length=99), bos="after")
    with pytest.raises(ConfigError, match="expected a BOS token in tokenizer; found none"):
        encode_prompt(task, tokenizer, {"input": "a"})


def test_truncation_takes_the_end_of_the_input_only(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    task = replace(e2e, max_length=12)
    whole = encode_prompt(e2e, tokenizer, {"input": SOURCE})
    prompt = encode_prompt(task, tokenizer, {"input": SOURCE}, room=5)
    assert prompt == [*whole[:6], 0]
    assert encode_prompt(task, tokenizer, {"input": SOURCE}, room=11) == [0]


def test_what_cannot_be_shortened_is_refused(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:3: expected at most 12 tokens; found 13 that cannot be shortened"):
        encode_prompt(replace(e2e, max_length=12), tokenizer, {"input": "a"}, room=12, where="d.jsonl:3")


def test_several_fields_and_escaped_braces(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    task = replace(e2e, input_template="{{{context}}} {question}", separator="")
    assert input_fields(task) == ("context", "question")
    prompt = encode_prompt(task, tokenizer, {"question": "b {x}", "context": "a"})
    assert tokenizer.decode(prompt) == "{a} b {x}"


def test_unknown_and_missing_fields_are_named(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    with pytest.raises(DataError, match=r"expected the fields 'input'; found 'inptu'; did you mean 'input'\?"):
        encode_prompt(e2e, tokenizer, {"inptu": "a"})
    with pytest.raises(DataError, match="expected the field 'input'; found no field"):
        encode_prompt(e2e, tokenizer, {})


def test_half_a_surrogate_pair_is_refused(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    with pytest.raises(DataError, match="expected Unicode text"):
        encode_prompt(e2e, tokenizer, {"input": "caf\udce9"})


@pytest.mark.parametrize("template", ["{input", "{}", "{input.x}", "{input!r}", "{input:>9}", "{0}"])
def test_malformed_template_is_refused(template: str, tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    with pytest.raises(ConfigError, match="write a brace as"):
        check_task(replace(e2e, input_template=template), tokenizer)


def test_target_template_has_the_one_field_target(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    with pytest.raises(ConfigError, match=r"expected the one field \{target\}; .*; write \{target\} once"):
        check_task(replace(e2e, target_template="{output}"), tokenizer)


def test_stop_must_be_one_token(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    with pytest.raises(ConfigError, match="stop token 'the end': expected exactly one token"):
        stop_ids(replace(e2e, stop=("the end",)), tokenizer)


def test_first_stop_is_taught_and_each_ends_a_target(tokenizer: ModelTokenizer, e2e: TaskRecord) -> None:
    task = replace(e2e, stop=("<|im_end|>", END))
    end = tokenizer.token_id("<|im_end|>")
    taught = encode_target(task, tokenizer, "a pub . ")
    assert stop_ids(task, tokenizer) == (end, 0)
    assert taught[-1] == end
    assert decode_target(task, tokenizer, [*taught, 7, 7]) == "a pub ."
    assert decode_target(task, tokenizer, [*taught[:-1], 0, 7]) == "a pub ."
    assert decode_target(task, tokenizer, taught[:-1]) == "a pub ."
