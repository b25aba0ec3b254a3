"""Encoders of text and of images as functions of tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.geometry import reader_of
from prefixkit.backbones.positions import first_position
from prefixkit.backbones.vision import VisionEncoder
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.export.reader_rows import counted, filled, inserted, slots
from prefixkit.export.reader_wrapper import DecoderReader, FlatReader, Inputs, Outputs
from prefixkit.serving.report import ReaderParts


def flat_reader(backbone: ReadingBackbone, plan: ReaderParts) -> FlatReader:
    """The function of `backbone`."""
    if isinstance(backbone, Decoder):
        return DecoderReader(backbone, plan)
    return ImageReader(backbone, plan) if isinstance(backbone, VisionEncoder) else TextReader(backbone, plan)


class TextReader(FlatReader):
    """An encoder of text."""

    def __init__(self, backbone: ReadingBackbone, plan: ReaderParts) -> None:
        super().__init__(backbone, plan)
        self.first = first_position(self.model)

    def _outputs(self, inputs: Inputs) -> Outputs:
        ids, rows = inputs["input_ids"], inputs.get("prompt_embeddings")
        keywords = {"input_ids": ids} if rows is None else {"inputs_embeds": self._vectors(ids, rows)}
        if "token_type_ids" in inputs:
            keywords["token_type_ids"] = self._placed(inputs["token_type_ids"], inputs)
        if "position_ids" in inputs:
            keywords["position_ids"] = inputs["position_ids"] + self.first
        with self._added(inputs, self._places(inputs)):
            return self._run(inputs, inputs["attention_mask"], **keywords)

    def _vectors(self, ids: Tensor, rows: Tensor) -> Tensor:
        vectors: Tensor = self.model.get_input_embeddings()(ids.clamp(min=0))
        if self.plan.placement == "slots":
            return filled(vectors, ids, rows)
        return inserted(self.plan.placement, rows, vectors)

    def _places(self, inputs: Inputs) -> Tensor | None:
        """[batch, placed]: which row of `hidden_prompts` is added to what, counted from 1; 0 for none."""
        ids, placement = inputs["input_ids"], self.plan.hidden_placement
        if placement is None:
            return None
        begin = 1 if placement == "after_first" else 0
        rows = slots(ids) if placement == "slots" else counted(ids, begin, inputs["hidden_prompts"].shape[2])
        return self._placed(rows, inputs)


class ImageReader(FlatReader):
    """An encoder of images; its prompt stands behind the class token."""

    def __init__(self, backbone: ReadingBackbone, plan: ReaderParts) -> None:
        super().__init__(backbone, plan)
        assert isinstance(backbone, VisionEncoder)
        # Registers have no positions.
        registers = int(getattr(self.model.config, "num_register_tokens", 0))
        self.tokens = int(reader_of(self.model).embeddings.position_embeddings.shape[1]) + registers
        self.special = self.tokens - backbone.patches

    def _real(self, inputs: Inputs) -> Tensor | None:
        return None

    def _outputs(self, inputs: Inputs) -> Outputs:
        before, prefix = inputs["prefix_attention_mask"], self._prefix(inputs)
        image = torch.ones_like(inputs["pixel_values"][:, 0, 0, :1], dtype=before.dtype).expand(-1, self.tokens)
        real = torch.cat([before[:, :prefix], inserted(self.plan.placement, before[:, prefix:], image)], dim=1)
        with self._inserted(inputs.get("prompt_embeddings")), self._added(inputs, self._places(inputs, image)):
            return self._run(inputs, real, pixel_values=inputs["pixel_values"])

    def _places(self, inputs: Inputs, image: Tensor) -> Tensor | None:
        if self.plan.hidden_placement is None:
            return None
        begin = self.special if self.plan.hidden_placement == "after_first" else 0
        return self._placed(counted(image, begin, inputs["hidden_prompts"].shape[2]), inputs)

    @contextmanager
    def _inserted(self, rows: Tensor | None) -> Iterator[None]:
        if rows is None:
            yield
            return
        embeddings, placement = reader_of(self.model).embeddings, self.plan.placement
        hook = embeddings.register_forward_hook(lambda *of: inserted(placement, rows, of[2]))
        try:
            yield
        finally:
            hook.remove()
