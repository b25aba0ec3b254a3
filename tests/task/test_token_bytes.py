"""How much text a token can stand for at most, and of which tokenizers that is known."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from prefixkit.task import ModelTokenizer
from prefixkit.task.token_bytes import most_bytes
from tests.small_tokenizer import END, small_backend, small_tokenizer

CHARACTERS = "ab eß\u0308\u0301\u0341\u1fbe\u212a한\u1112\u1161\u11ab👍 \n"


def byte_fallback() -> Tokenizer:
    """Llama 2's habits."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def composing() -> Tokenizer:
    """Qwen's habits."""
    backend = small_backend()
    backend.normalizer = normalizers.NFC()
    return backend


@pytest.mark.parametrize("make", [small_backend, byte_fallback, composing])
def test_no_token_stands_for_more(make: Callable[[], Tokenizer]) -> None:
    backend = make()
    most, draw = most_bytes(backend), random.Random(0)
    for length in (1, 2, 3, 10, 300):
        for _ in range(100):
            text = "".join(draw.choices(CHARACTERS, k=length))
            assert len(text.encode()) <= len(backend.encode(text, add_special_tokens=False).ids) * most


def test_the_limit_is_the_longest_token() -> None:
    assert most_bytes(small_backend()) == max(map(len, [*small_backend().get_vocab(), END]))
    assert most_bytes(composing()) == 4 * most_bytes(small_backend())
    assert most_bytes(byte_fallback()) == 6


def lossy(name: str) -> Tokenizer:
    backend = small_backend()
    match name:
        case "lower case":
            backend.normalizer = normalizers.Lowercase()
        case "shorter":
            backend.normalizer = normalizers.Replace("abc", "a")
        case "compatibility":
            backend.normalizer = normalizers.NFKC()
        case "white space dropped":
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
        case "parts dropped":
            parts = [pre_tokenizers.Split(",", "removed"), pre_tokenizers.ByteLevel()]
            backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        case "white space taken in":
            backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
        case "unknown bytes dropped":
            backend = Tokenizer(models.BPE({"a": 0}, []))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel()
        case "unknown words":
            backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
            backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@pytest.mark.parametrize(
    "name",
    [
        *("lower case", "shorter", "compatibility", "white space dropped", "parts dropped", "white space taken in"),
        *("unknown bytes dropped", "unknown words"),
    ],
)
def test_where_text_is_lost_nothing_is_known(name: str) -> None:
    backend = lossy(name)
    assert most_bytes(backend) is None
    assert not ModelTokenizer(backend).surely_more("a" * 10**6, 1)


def test_what_surely_has_more_tokens() -> None:
    tokenizer = small_tokenizer()
    most = most_bytes(tokenizer.backend)
    assert not tokenizer.surely_more("a" * most * 3, 3)
    assert tokenizer.surely_more("a" * most * 3 + "a", 3)
    assert tokenizer.surely_more("\ud800" * most, 1)


def test_other_threads_go_on_while_a_long_text_is_tokenised() -> None:
    tokenizer, text, ticks, done = small_tokenizer(), "Blue Spice " * 20_000, [0], Event()
    assert tokenizer.encode_text(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0)

    interval, other = sys.getswitchinterval(), Thread(target=tick)
    # Threads then change only where one of them lets go.
    sys.setswitchinterval(1000)
    try:
        other.start()
        before = ticks[0]
        tokenizer.encode_text(text)
        assert ticks[0] > before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()
