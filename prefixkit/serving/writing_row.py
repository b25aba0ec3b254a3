"""One text that an engine writes: from the logits of a token to the text that is certain by then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from prefixkit.serving.generation import Completion, Finish, Prompt
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.request import Progress, Request, TokenScore
from prefixkit.serving.sampling import Sampler
from prefixkit.serving.stop_text import StopText
from prefixkit.serving.streaming import TextStream
from prefixkit.task import ModelTokenizer


@dataclass
class WritingRow:
    """A request, from the moment it is accepted.

    Attributes:
        number: of the request.
        written: its tokens so far.
    """

    number: int
    request: Request
    prompt: Prompt
    tokenizer: ModelTokenizer
    written: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.request.sampling, 0, self.prompt.ids)
        self._stream, self._stops, self._text = TextStream(self.tokenizer), StopText(self.request.stop), ""

    @property
    def slots(self) -> int:
        """What it takes of a buffer at most: the last token is written and never read."""
        return self.prompt.slots + self.prompt.max_new_tokens - 1

    @property
    def takes_likeliest(self) -> bool:
        """Whether it asks for nothing but the likeliest token, so that its logits need not be looked at."""
        sampling = self.request.sampling
        return sampling.temperature == 0 and sampling.repetition_penalty == 1 and self.request.logprobs is None

    def advance(self, token: int | None, logits: Array | None) -> Progress:
        """Write the next token: `token`, or the one chosen from its `logits` [vocab]."""
        if token is None:
            assert logits is not None
            token = self._sampler.choose(logits)
        if token in self.prompt.stop:
            return self._finished("stop", "")
        self.written.append(token)
        scores = self._scores(token, logits)
        text = self._stops.push("" if token in self.prompt.silent else self._stream.push(token))
        if self._stops.met:
            return self._finished("stop", text, scores, rest=False)
        if len(self.written) == self.prompt.max_new_tokens:
            return self._finished("length", text, scores)
        self._text += text
        return Progress(self.number, text, None, scores)

    def _finished(
        self, finish: Finish, text: str, scores: tuple[TokenScore, ...] = (), *, rest: bool = True
    ) -> Progress:
        if rest:
            text += self._stops.push(self._stream.finish())
            finish = "stop" if self._stops.met else finish
            text += self._stops.finish()
        self._text += text
        completion = Completion(
            text=self._text, token_ids=tuple(self.written), finish=finish, prompt_tokens=len(self.prompt.ids)
        )
        return Progress(self.number, text, completion, scores)

    def _scores(self, token: int, logits: Array | None) -> tuple[TokenScore, ...]:
        if self.request.logprobs is None:
            return ()
        assert logits is not None
        exact = logits.astype(np.float64)
        scores = exact - exact.max()
        scores -= np.log(np.exp(scores).sum())
        likeliest = np.argsort(-scores, kind="stable")[: self.request.logprobs].tolist()
        top = tuple((one, self.tokenizer.decode([one]), float(scores[one])) for one in likeliest)
        return (TokenScore(token, self.tokenizer.decode([token]), float(scores[token]), top),)
