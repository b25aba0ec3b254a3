"""Streaming: whole characters only, and together what decoding everything at once gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkit.serving.streaming import TextStream, Trimmed
from tests.small_tokenizer import small_tokenizer

TOKENIZER = small_tokenizer()
TEXTS = ["Blue Spice is a pub .", "  naïve café 日本語 🦜🏽 ok  ", "\n\n", "", "a \n b", "🦜"]


def pieces(ids: list[int]) -> list[str]:
    stream, trimmed = TextStream(TOKENIZER), Trimmed()
    return [*(trimmed.push(stream.push(token)) for token in ids), trimmed.push(stream.finish())]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_and_hold_no_half_characters(text: str) -> None:
    parts = pieces(TOKENIZER.encode_text(text))
    assert "".join(parts) == text.strip()
    assert not any("\ufffd" in part for part in parts)


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    ids = TOKENIZER.encode_text("🦜")
    assert len(ids) > 1
    assert pieces(ids) == [""] * (len(ids) - 1) + ["🦜", ""]


def test_text_is_not_held_back_longer_than_needed() -> None:
    ids = TOKENIZER.encode_text("the pub")
    assert pieces(ids)[0] != ""


def test_bytes_that_never_become_a_character_are_shown_as_broken() -> None:
    parts = pieces([*TOKENIZER.encode_text("a"), TOKENIZER.encode_text("🦜")[0]])
    assert parts == ["a", "", "\ufffd"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(min_value=1, max_value=319), max_size=40))
def test_any_tokens_stream_as_they_decode(ids: list[int]) -> None:
    known = [token for token in ids if TOKENIZER.backend.id_to_token(token) is not None]
    assert "".join(pieces(known)) == TOKENIZER.decode(known).strip()
