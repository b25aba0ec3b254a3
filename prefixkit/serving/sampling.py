"""From logits to the next token: greedy, or one draw from what temperature, top-k, top-p and min-p leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefixkit.errors import ConfigError
from prefixkit.serving.prefix_table import Array

PENALTIES = 0.01, 100.0
"""Repetition penalties, far beyond what is of use; further out, logits overflow."""


def _require(option: str, expected: str, found: object, holds: bool) -> None:
    if not holds:
        raise ConfigError(option, expected=expected, found=str(found))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The default is greedy.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw from this many of the likeliest tokens only.
        top_p: draw from the likeliest tokens that hold this much probability together (Holtzman et al. 2020).
        min_p: draw from tokens with at least this fraction of the likeliest one's probability.
        repetition_penalty: above 1, divides the odds of tokens that the text already has (Keskar et al. 2019).
        seed: row i of a batch draws as a single text would with seed + i.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("--temperature", "0 or more", self.temperature, self.temperature >= 0)
        _require("--top-k", "1 or more", self.top_k, self.top_k is None or self.top_k >= 1)
        _require("--top-p", "above 0, at most 1", self.top_p, self.top_p is None or 0 < self.top_p <= 1)
        _require("--min-p", "from 0 to 1", self.min_p, self.min_p is None or 0 <= self.min_p <= 1)
        least, most = PENALTIES
        bounded = least <= self.repetition_penalty <= most
        _require("--repetition-penalty", f"from {least:g} to {most:g}", self.repetition_penalty, bounded)
        _require("--seed", "0 or more", self.seed, self.seed >= 0)
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (None, None, None):
            found = "0, which takes the likeliest token whatever else is asked"
            raise ConfigError("--temperature", expected="above 0 with --top-k, --top-p or --min-p", found=found)


GREEDY = Sampling()
_LIGHT = 1e-4
"""Of the likeliest token's probability."""


class Sampler:
    """The choices of one row, with a generator of its own, so that its neighbours do not matter."""

    def __init__(self, sampling: Sampling, row: int, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed + row)
        self.seen = set(prompt)

    def choose(self, logits: Array) -> int:
        """The next token, from its logits [vocab]."""
        scores = self._penalised(logits.astype(np.float64))
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            # The likeliest stays 0 however small the temperature is; the others may become -infinity, never NaN.
            with np.errstate(over="ignore"):
                token = self._draw((scores - scores.max()) / self.sampling.temperature)
        self.seen.add(token)
        return token

    def _penalised(self, scores: Array) -> Array:
        if self.sampling.repetition_penalty != 1:
            seen = np.fromiter(self.seen, dtype=np.int64)
            penalty = self.sampling.repetition_penalty
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        return scores

    def _draw(self, scores: Array) -> int:
        weights = np.exp(scores)
        kept = self._kept(weights)
        cumulated = weights[kept].cumsum()
        drawn = self.random.random() * cumulated[-1]
        return int(kept[np.searchsorted(cumulated, drawn, side="right").clip(max=len(cumulated) - 1)])

    def _kept(self, weights: Array) -> Array:
        """The tokens to draw from, of which the likeliest weighs 1."""
        how, kept = self.sampling, np.arange(len(weights))
        if how.min_p is not None:
            kept = np.flatnonzero(weights >= how.min_p)
        if how.top_k is not None:
            kept = kept[likeliest(weights[kept], how.top_k)]
        if how.top_p is not None:
            kept = _nucleus(weights, kept, how.top_p)
        return kept


def likeliest(scores: Array, count: int) -> Array:
    """The places of the `count` largest of `scores` [vocab], largest first; equal ones in order, on every machine."""
    places = np.arange(len(scores))
    if 0 < count < len(scores):
        places = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return places[np.argsort(-scores[places], kind="stable")][:count]


def _nucleus(weights: Array, kept: Array, share: float) -> Array:
    """Of the tokens `kept`, the likeliest that hold this `share` of their weight together."""
    wanted = share * weights[kept].sum()
    # Few hold nearly all of it: the others need not be sorted.
    heavy = kept[weights[kept] >= _LIGHT]
    heavy = heavy if weights[heavy].sum() >= wanted else kept
    ordered = heavy[likeliest(weights[heavy], len(heavy))]
    # The first token that reaches the sum is the last one kept.
    return ordered[: np.searchsorted(weights[ordered].cumsum(), wanted) + 1]
