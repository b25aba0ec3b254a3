"""Where a prompt's vectors stand: before the text, or in the slots that the task's template marks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt
from prefixkit.injections.combined import NOWHERE
from prefixkit.methods.method import Material


@dataclass(frozen=True)
class Place:
    """A place for input vectors.

    Attributes:
        stack: whose input it is, `decoder` or `encoder`.
        slots: whether it is in the text, where the template says so; else it is before it.
    """

    stack: str = "decoder"
    slots: bool = False

    def prompt(self, vectors: Tensor, token_ids: tuple[int, ...] | None = None) -> EmbeddingPrompt:
        """`vectors` [prefix, hidden] in this place; `token_ids` are the tokens that they equal, where they do."""
        return EmbeddingPrompt(
            embeddings=vectors,
            positions=NOWHERE if self.slots else Positions(text_start=vectors.shape[0]),
            token_ids=token_ids,
            stack=self.stack,
            placement="slots" if self.slots else "prepend",
        )


def place_for(material: Material) -> Place:
    """The place that backbone and task have for a prompt."""
    return Place("decoder" if material.backbone.kind == "decoder" else "encoder", material.slots > 0)
