"""Vectors in the places of a prompt: in the place of token vectors, or at the input of every layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prefixkit.format import names
from prefixkit.format.manifest import InjectionRecord, Positions
from prefixkit.injections.arrays import array
from prefixkit.prefix import Array


@dataclass(frozen=True, kw_only=True)
class EmbeddingPrompt:
    """Input vectors in the place of token vectors.

    Lester et al. 2021 (arXiv 2104.08691) train them as prompt tuning.

    Attributes:
        embeddings: [prefix, hidden], after the model's embedding scale, before position embeddings are added.
        positions: where the text that follows starts counting; a prepended prompt stands at the positions before it.
        token_ids: the tokens that the vectors equal, where they are real ones.
        placement: `prepend`, before the text; `after_first`, behind its first token, on images after positions were
            added; `slots`, where the task's template says `{slot}`.
    """

    embeddings: Tensor
    positions: Positions
    token_ids: tuple[int, ...] | None = None
    stack: str = field(default="decoder")
    placement: str = field(default="prepend")

    @property
    def length(self) -> int:
        """The number of prompt vectors."""
        return self.embeddings.shape[0]

    def record(self) -> InjectionRecord:
        """How a manifest describes this injection."""
        return InjectionRecord(
            kind="embedding_prompt",
            stack=self.stack,
            length=self.length,
            placement=self.placement,
            positions=self.positions,
            token_ids=self.token_ids,
        )

    def arrays(self) -> dict[str, Array]:
        """The tensor under the name that a prefix file gives it."""
        return {names.PROMPT: array(self.embeddings)}


@dataclass(frozen=True, kw_only=True)
class HiddenPrompt:
    """The inputs of every layer at a prompt's places.

    Jia et al. 2022 (arXiv 2203.12119) replace them (VPT-deep), Qin & Eisner 2021 (arXiv 2104.06599) add to them.

    Attributes:
        hidden: one tensor a layer, [prefix, hidden].
        mode: `replace` gives the prompt rows of its own, which begin anew in every layer; `add` changes what is there.
        placement: as of `EmbeddingPrompt`; with `add`, `prepend` and `after_first` name the first tokens, or those
            behind the first one.
        positions: where the text that follows starts counting.
    """

    hidden: tuple[Tensor, ...]
    mode: str
    placement: str
    positions: Positions
    stack: str = field(default="encoder")

    @property
    def length(self) -> int:
        """The number of places."""
        return self.hidden[0].shape[0]

    def record(self) -> InjectionRecord:
        """How a manifest describes this injection."""
        return InjectionRecord(
            kind="hidden_prompt",
            stack=self.stack,
            length=self.length,
            mode=self.mode,
            placement=self.placement,
            positions=self.positions,
        )

    def arrays(self) -> dict[str, Array]:
        """The tensors under the names that a prefix file gives them."""
        return {names.hidden(self.stack, layer): array(rows) for layer, rows in enumerate(self.hidden)}
