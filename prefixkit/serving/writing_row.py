"""One text that an engine writes: from the logits of a token to the text that is certain by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from prefixkit.serving.generation import Completion, Finish, Prompt
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.request import Progress, TokenScore
from prefixkit.serving.sampling import Sampler, Sampling, likeliest
from prefixkit.serving.stop_text import StopText
from prefixkit.serving.streaming import TextStream, Trimmed
from prefixkit.task import ModelTokenizer


@dataclass
class WritingRow:
    """A text, from the moment it is asked for.

    Attributes:
        number: of the request, or of the row.
        stop: texts that end it.
        logprobs: how many alternatives are scored a token; None scores nothing.
        written: its tokens so far.
    """

    number: int
    prompt: Prompt
    tokenizer: ModelTokenizer
    sampling: Sampling
    stop: Sequence[str] = ()
    logprobs: int | None = None
    written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.sampling, 0, self.prompt.ids)
        # Stop texts may be white space, which is taken off the ends after they were looked for.
        self._stream, self._stops, self._trimmed = TextStream(self.tokenizer), StopText(self.stop), Trimmed()
        self._text = ""

    @property
    def slots(self) -> int:
        """What it takes of a buffer at most: the last token is written and never read."""
        return self.prompt.slots + self.prompt.max_new_tokens - 1

    @property
    def takes_likeliest(self) -> bool:
        """Whether it asks for nothing but the likeliest token, so that its logits need not be looked at."""
        sampling = self.sampling
        return sampling.temperature == 0 and sampling.repetition_penalty == 1 and self.logprobs is None

    def advance(self, token: int | None, logits: Array | None) -> Progress:
        """Write the next token: `token`, or the one chosen from its `logits` [vocab]."""
        if token is None:
            assert logits is not None
            token = self._sampler.choose(logits)
        if token in self.prompt.stop:
            return self._finished("stop")
        self.written.append(token)
        scores = self._scores(token, logits)
        text = self._stops.push("" if token in self.prompt.silent else self._stream.push(token))
        if self._stops.met:
            return self._finished("stop", text, scores)
        if len(self.written) == self.prompt.max_new_tokens:
            return self._finished("length", text, scores)
        return Progress(self.number, self._more(text), None, scores)

    def _more(self, text: str) -> str:
        piece = self._trimmed.push(text)
        self._text += piece
        return piece

    def _finished(self, finish: Finish, text: str = "", scores: tuple[TokenScore, ...] = ()) -> Progress:
        if not self._stops.met:
            text += self._stops.push(self._stream.finish())
            finish = "stop" if self._stops.met else finish
            text += self._stops.finish()
        piece = self._more(text)
        completion = Completion(
            text=self._text, token_ids=tuple(self.written), finish=finish, prompt_tokens=len(self.prompt.ids)
        )
        return Progress(self.number, piece, completion, scores)

    def _scores(self, token: int, logits: Array | None) -> tuple[TokenScore, ...]:
        if self.logprobs is None:
            return ()
        assert logits is not None
        exact = logits.astype(np.float64)
        scores = exact - exact.max()
        scores -= np.log(np.exp(scores).sum())
        top = tuple((one, self._spelled(one), float(scores[one])) for one in likeliest(scores, self.logprobs).tolist())
        return (TokenScore(token, self._spelled(token), float(scores[token]), top),)

    def _spelled(self, token: int) -> str:
        return self.tokenizer.decode([token])


def rows_of(prompts: Sequence[Prompt], tokenizer: ModelTokenizer, sampling: Sampling) -> list[WritingRow]:
    """A row for each prompt; row i draws with the seed of `sampling` and i more."""
    return [
        WritingRow(row, prompt, tokenizer, replace(sampling, seed=sampling.seed + row))
        for row, prompt in enumerate(prompts)
    ]
