"""Words that are to be tagged: golden ids, where each begins, and what happens where they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefixkit.errors import ConfigError, DataError
from prefixkit.task import encode_words, load_task
from tests.encoders import SPECIAL
from tests.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer(special_tokens=SPECIAL)
TASK = load_task("tagging", TOKENIZER, max_length=64, kind="encoder")
CLS, SEP = TOKENIZER.token_id("<s>"), TOKENIZER.token_id("<|im_end|>")
WORDS = ("Blue", "Spice", "zzz", "near")


def pieces() -> list[list[int]]:
    return [TOKENIZER.encode_text(word if index == 0 else f" {word}") for index, word in enumerate(WORDS)]


def test_every_word_but_the_first_has_a_space_before_it() -> None:
    found = encode_words(TASK, TOKENIZER, WORDS, where="d:1")
    each = pieces()
    assert found.ids == (CLS, *(token for piece in each for token in piece), SEP)
    assert found.starts == tuple(1 + sum(map(len, each[:index])) for index in range(4))
    assert found.lost == 0


def test_words_are_lost_whole_from_the_end() -> None:
    each = pieces()
    room = 2 + sum(map(len, each[:2])) + 1
    assert len(each[2]) > 1
    found = encode_words(replace(TASK, max_length=room), TOKENIZER, WORDS, where="d:1")
    assert found.ids == (CLS, *each[0], *each[1], SEP)
    assert len(found.starts) == 2
    assert found.lost == len(each[2]) + len(each[3])


def test_a_decoder_reads_the_words_alone_behind_its_bos() -> None:
    for adds_bos in (False, True):
        tokenizer = small_tokenizer(adds_bos=adds_bos)
        found = encode_words(load_task("tagging", tokenizer, max_length=64), tokenizer, ("pub",), where="d:1")
        opening = (tokenizer.bos_id,) if adds_bos else ()
        assert found.ids == (*opening, *tokenizer.encode_text("pub"))
        assert found.starts == (len(opening),)


def test_a_special_tokens_spelling_in_a_word_is_plain_text() -> None:
    assert encode_words(TASK, TOKENIZER, ("<s>",), where="d:1").ids.count(CLS) == 1


@pytest.mark.parametrize("template", ["{text}", "{tokens} {text}", "words"])
def test_a_template_has_the_field_alone(template: str) -> None:
    with pytest.raises(ConfigError, match=r"expected an input_template with {tokens} alone"):
        encode_words(replace(TASK, input_template=template), TOKENIZER, WORDS, where="d:1")


def test_half_a_character_is_refused_with_its_line() -> None:
    with pytest.raises(DataError, match="d:1: expected Unicode text"):
        encode_words(TASK, TOKENIZER, ("\ud800",), where="d:1")
