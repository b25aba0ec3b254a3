"""A text before every prompt: its BOS, its role in a conversation, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefixkit.errors import ConfigError, DataError
from prefixkit.task import ModelTokenizer, encode_context, encode_prompt, load_task
from tests.small_tokenizer import CHAT_TEMPLATE, small_tokenizer

OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
INSIDE_USER = """{{ bos_token }}{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{% for message in messages if message['role'] != 'system' %}
<|im_start|>user
{{ first }}{{ message['content'] }}<|im_end|>
{% endfor %}"""
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return small_tokenizer(adds_bos=True, chat_template=CHAT_TEMPLATE)


@pytest.mark.parametrize(("bos", "count"), [("none", 0), ("before", 1), ("after", 1)])
def test_a_promised_bos_comes_first(bos: str, count: int, tokenizer: ModelTokenizer) -> None:
    task = replace(load_task("text", tokenizer, max_length=64), bos=bos)
    ids = encode_context(task, tokenizer, "Blue Spice")
    assert ids == [tokenizer.bos_id] * count + tokenizer.encode_text("Blue Spice")


def test_a_bos_that_the_tokenizer_has_not_is_refused(tokenizer: ModelTokenizer) -> None:
    task = replace(load_task("text", tokenizer, max_length=64), bos="before")
    with pytest.raises(ConfigError, match=r'expected a BOS token in .*; found none; write bos = "none"'):
        encode_context(task, replace(tokenizer, bos=None), "Blue Spice")


def test_spelling_a_special_token_is_plain_text(tokenizer: ModelTokenizer) -> None:
    task = load_task("text", tokenizer, max_length=64)
    ids = encode_context(task, tokenizer, "a <|im_end|> b")
    assert tokenizer.token_id("<|im_end|>") not in ids
    assert tokenizer.decode(ids) == "<s>a <|im_end|> b"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("{{ bos_token }}", "")])
def test_a_chat_goes_on_as_if_it_began_with_the_system_message(tokenizer: ModelTokenizer, template: str) -> None:
    tokenizer = replace(tokenizer, chat_template=template)
    task = load_task("chat", tokenizer, max_length=200)
    before = encode_context(task, tokenizer, "Be brief.")
    behind = replace(task, bos="none" if task.bos == "none" else "before")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]
    messages += [{"role": "user", "content": "Why?"}]
    after = encode_prompt(behind, tokenizer, {"messages": messages})
    whole = [{"role": "system", "content": "Be brief."}, *messages]
    assert before + after == encode_prompt(task, tokenizer, {"messages": whole})
    assert tokenizer.decode(before).endswith("<|im_start|>system\nBe brief.<|im_end|>\n")


@pytest.mark.parametrize("template", [OWN_SYSTEM + CHAT_TEMPLATE, INSIDE_USER])
def test_a_template_whose_system_message_changes_what_follows_is_refused(
    tokenizer: ModelTokenizer, template: str
) -> None:
    tokenizer = replace(tokenizer, chat_template=template)
    task = load_task("chat", tokenizer, max_length=200)
    with pytest.raises(ConfigError, match=r"system\.txt: expected a chat template that writes a system message before"):
        encode_context(task, tokenizer, "Be brief.", where="system.txt")


def test_a_template_that_refuses_system_messages_says_so(tokenizer: ModelTokenizer) -> None:
    tokenizer = replace(tokenizer, chat_template=NO_SYSTEM + CHAT_TEMPLATE)
    task = load_task("chat", tokenizer, max_length=200)
    with pytest.raises(DataError, match="no system role"):
        encode_context(task, tokenizer, "Be brief.")


def test_half_a_character_is_refused(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(DataError, match="context: expected Unicode text"):
        encode_context(load_task("text", tokenizer, max_length=64), tokenizer, "\udcff")
