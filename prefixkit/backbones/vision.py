"""A frozen encoder of images: a class token and patches, read as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixkit.backbones.encoder import Encoder, without_rows
from prefixkit.backbones.encoder_layers import key_values_in
from prefixkit.backbones.geometry import reader_of
from prefixkit.backbones.hidden import added
from prefixkit.errors import BackboneError
from prefixkit.injections import EmbeddingPrompt, HiddenPrompt, KeyValuePrefix, Received, part_of


@dataclass
class VisionEncoder(Encoder):
    """An image encoder with frozen weights. Prompts stand behind its class token, positions having been added."""

    kind = "vision"

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        size, patch = _pair(self.model.config.image_size), _pair(self.model.config.patch_size)
        return (size[0] // patch[0]) * (size[1] // patch[1])

    @property
    def patch_numbers(self) -> int:
        """How many numbers a patch is made of: its height times its width times the channels."""
        height, width = _pair(self.model.config.patch_size)
        return height * width * int(self.model.config.num_channels)

    def states(self, inputs: Mapping[str, Tensor], received: Received | None = None) -> Tensor:
        """The final states [batch, 1 + patches, hidden] of `pixel_values` [batch, channels, height, width]."""
        prompt, hidden = part_of(received, EmbeddingPrompt), part_of(received, HiddenPrompt)
        hidden = hidden if hidden is not None and hidden.mode == "add" else None
        pixels = inputs["pixel_values"]
        places = None if hidden is None else self._places(len(pixels), hidden)
        with self.injected(received) as model, self._inserted(prompt), added(model, hidden, places):
            states: Tensor = reader_of(model)(pixel_values=pixels).last_hidden_state
        return without_rows(states, prompt)

    def _places(self, batch: int, hidden: HiddenPrompt) -> Tensor:
        """[batch, seq]: those behind every special token, of which DeiT has two, or the first ones."""
        placed = int(reader_of(self.model).embeddings.position_embeddings.shape[1])
        # Registers have no positions.
        special = placed - self.patches + getattr(self.model.config, "num_register_tokens", 0)
        begin = special if hidden.placement == "after_first" else 0
        if begin + hidden.length > special + self.patches:
            expected = f"at most {special + self.patches - begin} places to add to"
            raise BackboneError(self.identity.family, expected=expected, found=str(hidden.length))
        places = torch.zeros(batch, special + self.patches, dtype=torch.bool, device=self.device)
        places[:, begin : begin + hidden.length] = True
        return places

    @contextmanager
    def _inserted(self, prompt: EmbeddingPrompt | None) -> Iterator[None]:
        """Rows behind the class token for the length of a `with` block."""
        if prompt is None:
            yield
            return
        if prompt.placement != "after_first":
            found = f"one placed {prompt.placement}"
            raise BackboneError(self.identity.family, expected="a prompt behind the class token", found=found)
        hook = reader_of(self.model).embeddings.register_forward_hook(_inserting(prompt.embeddings))
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def key_values_of(self, token_ids: list[int]) -> KeyValuePrefix:
        """The keys and values of an image of noise, at as many of its tokens as `token_ids` has.

        Raises:
            BackboneError: more than an image has.
        """
        if not 0 < len(token_ids) <= 1 + self.patches:
            expected = f"from 1 to {1 + self.patches} slots, the tokens of an image"
            raise BackboneError("initialisation", expected=expected, found=str(len(token_ids)))
        config, generator = self.model.config, torch.Generator().manual_seed(0)
        pixels = torch.randn(1, config.num_channels, *_pair(config.image_size), generator=generator).to(self.device)
        seen = key_values_in(self._unhooked(), {"pixel_values": pixels.to(self.model.dtype)}, offset=False)
        length = len(token_ids)
        keys, values = ((each[:, :length] for each in tensors) for tensors in (seen.keys, seen.values))
        return KeyValuePrefix(keys=tuple(keys), values=tuple(values), positions=seen.positions, stack="encoder")

    @property
    def longest_text(self) -> int | None:
        """Tokens of an image."""
        return 1 + self.patches

    @property
    def vocabulary(self) -> Tensor:
        """None: images have no words. Raises BackboneError."""
        raise BackboneError(self.identity.family, expected="a model with a vocabulary", found="an encoder of images")


def _inserting(rows: Tensor) -> Any:
    def after(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        shared = rows.to(output).expand(len(output), -1, -1)
        return torch.cat([output[:, :1], shared, output[:, 1:]], dim=1)

    return after


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
