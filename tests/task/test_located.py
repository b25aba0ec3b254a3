"""Fields found again among the tokens, and separators as a tokenizer's own post-processor has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from prefixkit.errors import ConfigError
from prefixkit.task import ModelTokenizer, encode_prompt, load_task, locate
from tests.encoders import SPECIAL
from tests.small_tokenizer import small_backend, small_tokenizer

CLS, SEP = ("<s>", 1), ("<|im_end|>", 3)
PAIRS = {
    "none": (None, 1),
    "bert": (processors.BertProcessing(SEP, CLS), 1),
    "roberta": (processors.RobertaProcessing(SEP, CLS), 2),
    "template": (
        processors.TemplateProcessing(
            single="<s> $A <|im_end|>",
            pair="<s> $A <|im_end|> <|im_end|> $B:1 <|im_end|>:1",
            special_tokens=[CLS, SEP],
        ),
        2,
    ),
}


def tokenizer_with(processor: object) -> ModelTokenizer:
    backend: Tokenizer = small_backend()
    assert backend.token_to_id("<s>") == 1
    assert backend.token_to_id("<|im_end|>") == 3
    if processor is not None:
        backend.post_processor = processor
    return ModelTokenizer(backend, bos="<s>", special_tokens=SPECIAL)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_what_the_tokenizer_itself_makes_of_it(name: str) -> None:
    processor, separators = PAIRS[name]
    tokenizer = tokenizer_with(processor)
    assert tokenizer.separators == separators
    task = load_task("pair-classification", tokenizer, max_length=64, kind="encoder")
    ours = encode_prompt(task, tokenizer, {"text_a": "Blue", "text_b": "a pub"})
    theirs = tokenizer.backend.encode("Blue", "a pub").ids
    assert ours == (theirs if processor else [1, *tokenizer.encode_text("Blue"), 3, *tokenizer.encode_text("a pub"), 3])
    assert load_task("pair-classification", tokenizer, max_length=64).input_template == "{text_a}\n{text_b}"


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_places_are_the_last_fields_characters(kind: str) -> None:
    tokenizer = small_tokenizer(special_tokens=SPECIAL)
    task = load_task("question-answering", tokenizer, max_length=64, kind=kind)
    fields = {"question": "pub ?", "context": "near <s> caf\u00e9"}
    found = locate(task, tokenizer, fields, where="d:1")
    assert list(found.ids) == encode_prompt(task, tokenizer, fields)
    # A character of two tokens stands at both.
    pieces = sorted({place for place in found.places if place[0] < place[1]})
    assert "".join(fields["context"][begin:end] for begin, end in pieces) == fields["context"]
    assert found.places[0] == (0, 0)


def test_located_tokens_are_the_marked_ones() -> None:
    tokenizer = small_tokenizer(special_tokens=SPECIAL)
    parts = [("<s>Blue ", True), ("Spice <s>", False), ("<|im_end|>", True)]
    located = tokenizer.encode_located(parts)
    assert [token for token, _, _ in located] == tokenizer.encode_marked(parts)
    assert (located[0][1:], located[-1][1:]) == ((0, 3), (17, 27))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('answer = "choice"\ninput_template = "{text}"', r"with {choice} behind another field; found '{text}'"),
        ('answer = "choice"\ninput_template = "{choice}{text}"', r"with {choice} behind another field"),
        ('answer = "span"\ninput_template = "{context}"', "with a question and, as its last field, the text"),
        ('answer = "span"\nlabels = ["a", "b"]\ninput_template = "{q}{c}"', "beside labels; found 'span'"),
    ],
)
def test_a_template_without_what_its_answer_needs_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(settings)
    with pytest.raises(ConfigError, match=message):
        load_task(path, small_tokenizer(special_tokens=SPECIAL), max_length=64, kind="encoder")
