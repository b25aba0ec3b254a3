"""A long text as a prefix, against the same text as tokens of the prompt, and against its cache, kept and rewound.

The prefix is what the model itself computes for the text, so that all three go on with the same token.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from prefixkit.prefix import Prefix
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.session import Session
from tests.bench.rounds import Row, alternate, compare
from tests.bench.serving_peers import load_model
from tests.bench.serving_work import Effort, Tell, Tokens, UnequalError, Work, prefix_of

METRIC = "milliseconds to the first tokens"
PROMPT, REWOUND = "ours, the text as prompt", "ours, its cache kept and rewound"


class _Ways:
    """Rows of one session, and three ways to have the text before their prompts."""

    def __init__(self, work: Work) -> None:
        self.text, self.prompts = work.prompts(work.length)[0], work.prompts()
        session = Session(work.buffered, device=work.device, threads=work.threads)  # type: ignore[arg-type]
        assert isinstance(session.runtime, BufferedRuntime)
        session.add_prefix("text", computed(work, self.text))
        self.prefix: Any = session.prefixes["text"]
        # A cache that is kept takes rows of its own.
        self.rows, self.kept = (session.runtime.rows(work.rows, work.capacity) for _ in range(2))
        for number in range(work.rows):
            self.kept.begin(number, self.prefix)
        self.tokens: list[int] = []

    def as_prefix(self, _: int) -> float:
        """Milliseconds, copies of the prefix included."""
        began = time.perf_counter()
        for number in range(len(self.prompts)):
            self.rows.begin(number, self.prefix)
        return self._read(self.rows, self.prompts, began)

    def as_prompt(self, _: int) -> float:
        """Milliseconds."""
        began = time.perf_counter()
        for number in range(len(self.prompts)):
            self.rows.begin(number, None)
        return self._read(self.rows, [self.text + prompt for prompt in self.prompts], began)

    def rewound(self, _: int) -> float:
        """Milliseconds: only the place to write at is set back."""
        began = time.perf_counter()
        self.kept.write_index[:], self.kept.positions[:] = len(self.text), len(self.text)
        return self._read(self.kept, self.prompts, began)

    def _read(self, rows: Any, prompts: list[Tokens], began: float) -> float:
        self.tokens = rows.read(0, prompts).tokens.tolist()
        return 1000 * (time.perf_counter() - began)


@torch.inference_mode()
def computed(work: Work, text: Tokens) -> Prefix:
    """Keys and values of `text` as transformers computes them."""
    past = load_model(work)(torch.tensor([text], device=work.device), use_cache=True).past_key_values
    pairs = [each for layer in past.layers for each in (layer.keys, layer.values)]
    return prefix_of(work.identity, [each[0].float().cpu().numpy().astype(work.numpy) for each in pairs])


def measure(case: str, work: Work, effort: Effort, tell: Tell) -> list[Row]:
    """The prefix against both.

    Raises:
        UnequalError: not the same tokens.
    """
    ways = _Ways(work)
    turns = {"ours": ways.as_prefix, PROMPT: ways.as_prompt, REWOUND: ways.rewound}
    tokens = {}
    for name, turn in turns.items():
        turn(0)
        tokens[name] = ways.tokens
        same = sum(one == other for one, other in zip(tokens["ours"], tokens[name], strict=True))
        if same < work.rows * (1 if work.dtype == "float32" else 0.5):
            raise UnequalError(f"{case}: not the same work: {tokens}")
    tell(f"{case}: the same tokens")
    return compare(case, METRIC, alternate(turns, effort.rounds))
