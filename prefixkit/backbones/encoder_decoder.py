"""A frozen encoder-decoder: the encoder reads the prompt, the decoder writes the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prefixkit.backbones.attention import Injected
from prefixkit.backbones.backbone import Backbone, without_habits
from prefixkit.backbones.stacks import Stacks
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import Positions
from prefixkit.injections import Injection, KeyValuePrefix, KeyValuePrefixes

NO_POSITIONS = Positions(text_start=0, prefix_takes_positions=False)
"""Where text starts on an encoder-decoder: at 0, as if there were no prefix."""


@dataclass
class EncoderDecoder(Backbone):
    """An encoder-decoder with frozen weights.

    The encoder reads the ids of a prompt as they are: BART and T5 were taught that a source ends with EOS, and it is
    the task's separator that puts it there (`{eos}` where a task does not say otherwise). The decoder begins with the
    model's `decoder_start_token_id`; a BOS behind it, which BART was taught to write first, belongs to the target.
    """

    kind = "encoder-decoder"
    paired: ClassVar[bool] = True

    @cached_property
    def _stacks(self) -> Stacks:
        return Stacks(self.model)

    @property
    def longest_text(self) -> int | None:
        """Tokens that `key_values_of` takes at most; None without a limit."""
        return self.context_length

    def room_for_text(self, length: int) -> int | None:
        """The whole context: prefixes take no positions. A task's limit counts source and target together."""
        return self.context_length

    def room_behind(self, prefix: Injection | None) -> int | None:
        """The whole context, as of `room_for_text`."""
        return self.context_length

    def refuse_unplaceable(self, received: Injection) -> None:
        """Refuse what is no set of prefixes, and text that would start elsewhere than at 0.

        Raises:
            BackboneError: see above.
        """
        where = self.identity.family
        if not isinstance(received, KeyValuePrefixes):
            expected, found = "prefixes for an encoder-decoder", f"a {type(received).__name__}"
            raise BackboneError(where, expected=expected, found=found)
        for part in received.parts:
            if part.positions != NO_POSITIONS:
                found = f"{part.place} with text that starts at {part.positions.text_start}"
                raise BackboneError(where, expected="prefixes that take no positions", found=found)

    def fold(self, received: Injection) -> KeyValuePrefixes:
        """`received`, which is keys and values already. Raises BackboneError for anything else."""
        self.refuse_unplaceable(received)
        assert isinstance(received, KeyValuePrefixes)
        return received

    def states(self, inputs: Mapping[str, Tensor], received: Injection | None = None) -> Tensor:
        """Refused: heads on encoder-decoders are not offered. Raises BackboneError."""
        step = "use a task whose answer is text"
        raise BackboneError(self.identity.family, expected="no head", found="one", next_step=step)

    @contextmanager
    def injected(self, prefix: Injection | None) -> Iterator[PreTrainedModel]:
        """The model with `prefix` in it for the length of a `with` block."""
        parts = () if prefix is None else self.fold(prefix).parts
        received = {(part.stack, part.attention): Injected(keys=part.keys, values=part.values) for part in parts}
        with self._stacks.receiving(received) as model:
            yield model

    def release(self) -> PreTrainedModel:
        """The model as `transformers` made it, without our hooks."""
        if "_stacks" in self.__dict__:
            self._stacks.remove()
            del self.__dict__["_stacks"]
        return self.model

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor,
        prefix: Injection | None = None,
    ) -> Tensor:
        """Next-token logits [batch, target, vocab] of `decoder_input_ids` [batch, target], each row as if alone.

        `attention_mask` marks the real tokens of `input_ids` [batch, source]; their padding may be on either side. That
        of `decoder_input_ids` has to be on the right, where no real token sees it.
        """
        if attention_mask is not None:
            input_ids, attention_mask = _real_first(input_ids, attention_mask)
        with self.injected(prefix) as model:
            logits: Tensor = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            ).logits
        return logits

    def target_logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Injection | None = None
    ) -> Tensor:
        """The logits [tokens, vocab] that predict the tokens of `labels` [batch, target] that are not -100."""
        with self._logits_only_at(labels != -100):
            return self.logits(input_ids, attention_mask, self._decoder_input(labels), prefix)[0]

    def _decoder_input(self, labels: Tensor) -> Tensor:
        start = torch.full_like(labels[:, :1], self.model.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)

    def key_values_of(self, token_ids: list[int]) -> KeyValuePrefixes:
        """What each attention sees of a real text: read by the encoder, written by the decoder, and looked at by it.

        Attention in an encoder goes both ways, so that this is not the same as having the text in the context.

        Raises:
            BackboneError: an empty text.
        """
        if not token_ids:
            raise BackboneError("initialisation text", expected="at least one token", found="none")
        text = torch.tensor([token_ids], device=self.device)
        return KeyValuePrefixes(
            parts=tuple(
                KeyValuePrefix(
                    keys=tuple(layer.key[0].clone() for layer in layers),
                    values=tuple(layer.value[0].clone() for layer in layers),
                    positions=NO_POSITIONS,
                    stack=stack,
                    attention=attention,
                )
                for (stack, attention), layers in self._stacks.look(text, text).items()
            )
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix: Injection | None = None,
        *,
        stop: Sequence[int],
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> list[list[int]]:
        """What the decoder writes for each prompt, greedily or by beam search, as if that prompt were alone.

        It ends before the first stop token, after `max_new_tokens`, or where the context does.

        Raises:
            BackboneError: a prompt longer than the context.
        """
        self._refuse_too_long(max(map(len, prompts)))
        settings = GenerationConfig(
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=list(stop) or None,
            pad_token_id=stop[0] if stop else 0,
            decoder_start_token_id=self.model.config.decoder_start_token_id,
            max_new_tokens=min(max_new_tokens, self.context_length or max_new_tokens),
        )
        written = self._written(prompts, prefix, settings)
        return [list(takewhile(lambda token: token not in stop, row)) for row in written]

    def _refuse_too_long(self, longest: int) -> None:
        context = self.context_length
        if context is not None and longest > context:
            expected = f"at most {context} tokens, the context"
            raise BackboneError("prompt", expected=expected, found=f"{longest}", next_step="shorten it")

    def _written(
        self, prompts: Sequence[Sequence[int]], prefix: Injection | None, settings: GenerationConfig
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        rows = [[*prompt, *[settings.pad_token_id] * (width - len(prompt))] for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        with self.injected(prefix) as model, without_habits(model):
            written = model.generate(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                generation_config=settings,
            )
        targets: list[list[int]] = written[:, 1:].tolist()
        return targets


def _real_first(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    # BART counts slots: padding in front would move its text.
    order = attention_mask.bool().int().argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
