from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from prefixkit.errors import ConfigError, DataError
from prefixkit.task import (
    ModelTokenizer,
    chat_template_hash,
    check_task,
    encode_prompt,
    encode_target,
    load_task,
    render_chat,
)
from tests.small_tokenizer import CHAT_TEMPLATE, END, small_backend, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return small_tokenizer(adds_bos=True, chat_template=CHAT_TEMPLATE)


def test_prompt_is_the_rendered_conversation(tokenizer: ModelTokenizer) -> None:
    task = load_task("chat", tokenizer, max_length=200)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(tokenizer, messages) == rendered
    prompt = encode_prompt(task, tokenizer, {"messages": messages})
    assert tokenizer.decode(prompt) == rendered
    assert prompt.count(tokenizer.token_id("<|im_start|>")) == 3


def test_prompt_is_the_one_of_transformers(tokenizer: ModelTokenizer) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=small_backend(adds_bos=True), bos_token="<s>", eos_token=END, chat_template=CHAT_TEMPLATE
    )
    messages = [
        {"role": "user", "content": "  Hi <|im_end|> {{ caf\u00e9 }}\n"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    ours = encode_prompt(load_task("chat", tokenizer, max_length=200), tokenizer, {"messages": messages})
    assert ours == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(("bos", "count"), [("none", 0), ("before", 0), ("after", 1)])
def test_the_contract_decides_about_the_bos_that_the_template_writes(
    bos: str, count: int, tokenizer: ModelTokenizer
) -> None:
    task = load_task("chat", tokenizer, max_length=200)
    assert task.bos == "after"
    prompt = encode_prompt(replace(task, bos=bos), tokenizer, {"input": "Hi"})
    assert prompt.count(tokenizer.bos_id) == count


def test_template_without_bos_gets_none(tokenizer: ModelTokenizer) -> None:
    quiet = replace(tokenizer, chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    task = load_task("chat", quiet, max_length=200)
    assert task.bos == "none"
    assert quiet.bos_id not in encode_prompt(task, quiet, {"input": "Hi"})


def test_reply_ends_as_the_template_ends_a_turn(tokenizer: ModelTokenizer) -> None:
    task = load_task("chat", tokenizer, max_length=200)
    assert task.stop == ("<|im_end|>", END)
    assert encode_target(task, tokenizer, "Hello")[-1] == tokenizer.token_id("<|im_end|>")


def test_another_chat_template_is_refused(tokenizer: ModelTokenizer) -> None:
    task = load_task("chat", tokenizer, max_length=200)
    assert task.chat_template_hash == chat_template_hash(CHAT_TEMPLATE)
    for template, found in (("{{ messages }}", "another"), (None, "none")):
        with pytest.raises(ConfigError, match=f"that the prefix was trained with; found {found}"):
            check_task(task, replace(tokenizer, chat_template=template))


def test_long_conversation_is_refused_not_cut(tokenizer: ModelTokenizer) -> None:
    task = load_task("chat", tokenizer, max_length=30)
    with pytest.raises(DataError, match="expected at most 30 tokens"):
        encode_prompt(task, tokenizer, {"input": "word " * 30})


def test_what_the_template_refuses_is_one_line(tokenizer: ModelTokenizer) -> None:
    strict = replace(tokenizer, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        DataError, match=r"expected messages that the chat template accepts; found roles must alternate"
    ):
        render_chat(strict, [{"role": "user", "content": "Hi"}])


def test_template_can_not_reach_the_interpreter(tokenizer: ModelTokenizer) -> None:
    hostile = replace(tokenizer, chat_template="{{ messages.__class__.__mro__[-1].__subclasses__() }}")
    with pytest.raises(DataError, match="unsafe"):
        render_chat(hostile, [{"role": "user", "content": "Hi"}])


def test_broken_and_missing_templates(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(ConfigError, match="expected a valid chat template"):
        load_task("chat", replace(tokenizer, chat_template="{% for %}"), max_length=9)
    with pytest.raises(ConfigError, match="expected a chat template; found none"):
        load_task("chat", replace(tokenizer, chat_template=None), max_length=9)


def test_fields_of_another_task_are_refused(tokenizer: ModelTokenizer) -> None:
    chat, text = (load_task(name, tokenizer, max_length=99) for name in ("chat", "text"))
    with pytest.raises(DataError, match="expected 'messages' or 'input'; found question"):
        encode_prompt(chat, tokenizer, {"question": "a"})
    with pytest.raises(DataError, match="conversations need --task chat"):
        encode_prompt(text, tokenizer, {"messages": [{"role": "user", "content": "Hi"}]})
