"""Self-study: questions about a document, and what the backbone answers with the document before it.

As cartridges are trained (Eyuboglu et al. 2025, arXiv 2506.06266): the document is read in chunks, and the backbone
itself makes the conversations. Here a question is a piece of a line, from its beginning to a word drawn by chance, and
the answer is what the backbone writes next: this is what a model without instruction tuning can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

from prefixkit.backbones.decoder import Decoder
from prefixkit.errors import ConfigError
from prefixkit.methods.document import refuse_overlong
from prefixkit.task import ModelTokenizer


def self_study(
    backbone: Decoder,
    tokenizer: ModelTokenizer,
    document: str,
    *,
    count: int,
    seed: int = 0,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, str]]:
    """`count` conversations as records of `input` and `target`, for the task `continuation`.

    Args:
        document: a text that the backbone's context holds with `max_new_tokens` and a line to spare.
        temperature: of the answers; 1 draws from the backbone's own distribution.
        done: hears how many conversations there are, after each batch.

    Raises:
        ConfigError: a document without a line of two words, or one that the context does not hold.
        BackboneError: a question that leaves no token of the context.
    """
    questions = _questions(document, count, Random(seed))
    begun = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    tokens = [*begun, *tokenizer.encode_text(document)]
    refuse_overlong("document", tokens, backbone.longest_text)
    knowing = backbone.key_values_of(tokens)
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    answers: list[str] = []
    for start in range(0, count, batch_size):
        prompts = [tokenizer.encode_text(question) for question in questions[start : start + batch_size]]
        written = backbone.generate(
            prompts,
            knowing,
            stop=stop,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + start,
        )
        answers += map(tokenizer.decode, written)
        done(len(answers))
    pairs = zip(questions, answers, strict=True)
    return [{"input": question, "target": answer} for question, answer in pairs if answer.strip()]


def _questions(document: str, count: int, random: Random) -> list[str]:
    lines = [line for line in document.splitlines() if len(line.split()) > 1]
    if not lines:
        raise ConfigError("document", expected="a line of two words or more", found="none")
    return [_beginning(line, random) for line in _rounds(lines, count, random)]


def _rounds(lines: Sequence[str], count: int, random: Random) -> Iterator[str]:
    """`count` lines: all of them in random order, again and again, so that no line is left out by chance."""
    left: list[str] = []
    for _ in range(count):
        left = left or random.sample(lines, len(lines))
        yield left.pop()


def _beginning(line: str, random: Random) -> str:
    words = line.split(" ")
    return " ".join(words[: random.randint(1, len(words) - 1)])
