"""A frozen encoder-decoder: the encoder reads the source, the decoder writes the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prefixkit.backbones.attachment import one_for_all
from prefixkit.backbones.backbone import Backbone, without_habits
from prefixkit.backbones.pair import NO_POSITIONS as NO_POSITIONS
from prefixkit.backbones.pair import refuse_positions
from prefixkit.backbones.stacks import Stacks, placed
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import (
    EmbeddingPrompt,
    Injection,
    KeyValuePrefix,
    KeyValuePrefixes,
    Received,
    Several,
    part_of,
)


@dataclass
class EncoderDecoder(Backbone):
    """An encoder-decoder with frozen weights.

    It takes prefixes, or a prompt at the encoder's input: vectors in front of those of the source, which see the source
    and are looked at by the decoder as it is (Lester et al. 2021, arXiv 2104.08691). Such a prompt has no keys and
    values of its own and is not folded. It stands at the positions before the text: BART counts the text from its end,
    and T5's distances count its vectors.

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
    def vocabulary(self) -> Tensor:
        """[vocab, hidden]: the vector of every token that the encoder reads, after the model's embedding scale."""
        return self._read_by(torch.arange(self.identity.vocab_size, device=self.device)).detach()

    def _read_by(self, token_ids: Tensor) -> Tensor:
        # Without tied weights BART's encoder has a table of its own, and the model's first one is not read.
        vectors: Tensor = self.model.get_encoder().get_input_embeddings()(token_ids)
        return vectors

    @property
    def longest_text(self) -> int | None:
        """Tokens that `key_values_of` takes at most; None without a limit."""
        return self.context_length

    def room_for_text(self, length: int) -> int | None:
        """The whole context: prefixes take no positions. A task's limit counts source and target together."""
        return self.context_length

    def room_behind(self, prefix: Injection | None) -> int | None:
        """What a prompt leaves of the context; prefixes leave the whole of it."""
        prompt, context = part_of(prefix, EmbeddingPrompt), self.context_length
        return context if prompt is None or context is None else context - prompt.length

    def refuse_unplaceable(self, received: Injection) -> None:
        """Refuse what is neither a set of prefixes nor a prompt before the source, and text that starts elsewhere.

        Raises:
            BackboneError: see above.
            MismatchError: prompt vectors of another width than the model's.
        """
        match received:
            case KeyValuePrefixes(parts=parts):
                refuse_positions(parts, self.identity.family)
            case EmbeddingPrompt():
                self._refuse_prompt(received)
            case _:
                expected, found = "prefixes or a prompt for an encoder-decoder", f"a {type(received).__name__}"
                raise BackboneError(self.identity.family, expected=expected, found=found)

    def _refuse_prompt(self, prompt: EmbeddingPrompt) -> None:
        where, length = self.identity.family, prompt.length
        if (prompt.stack, prompt.placement, prompt.positions) != ("encoder", "prepend", Positions(text_start=length)):
            start = f"with text that starts at {prompt.positions.text_start}"
            found = f"one of the {prompt.stack}, placed {prompt.placement}, {start}"
            expected = f"a prompt at the encoder's input, with text that starts at {length}, behind it"
            raise BackboneError(where, expected=expected, found=found)
        if prompt.embeddings.shape[1] != self.hidden_size:
            expected, found = f"prompt vectors of width {self.hidden_size}", f"{prompt.embeddings.shape[1]}"
            step = "use the backbone that the prompt was trained on"
            raise MismatchError(where, expected=expected, found=found, next_step=step)
        if (room := self.room_behind(prompt)) is not None and room < 2:
            expected = f"a prompt shorter than the context of {self.context_length} tokens"
            raise BackboneError(where, expected=expected, found=f"{length} vectors")

    def fold(self, received: Injection) -> KeyValuePrefixes | EmbeddingPrompt:
        """`received` itself: keys and values already, or a prompt, which has none. Raises as `refuse_unplaceable`."""
        self.refuse_unplaceable(received)
        assert isinstance(received, (KeyValuePrefixes, EmbeddingPrompt))
        return received

    def states(self, inputs: Mapping[str, Tensor], received: Received | None = None) -> Tensor:
        """Refused: heads on encoder-decoders are not offered. Raises BackboneError."""
        step = "use a task whose answer is text"
        raise BackboneError(self.identity.family, expected="no head", found="one", next_step=step)

    @contextmanager
    def injected(self, received: Received | None) -> Iterator[PreTrainedModel]:
        """The model with the prefixes of `received` in it, for the length of a `with` block."""
        if isinstance(received, Several):
            raise one_for_all(self.identity.family)
        folded = None if received is None else self.fold(received)
        with self._stacks.receiving(placed(folded if isinstance(folded, KeyValuePrefixes) else None)) as model:
            yield model

    @contextmanager
    def _reading(
        self, input_ids: Tensor, attention_mask: Tensor | None, received: Received | None
    ) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
        """The model with `received` in it, and the source to call it with, padded on the right."""
        with self.injected(received) as model:
            prompt = part_of(received, EmbeddingPrompt)
            if prompt is None:
                yield model, {"input_ids": input_ids, "attention_mask": attention_mask}
                return
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            vectors: Tensor = self._read_by(input_ids)
            rows = prompt.embeddings.to(vectors).expand(len(vectors), -1, -1)
            seen = torch.cat([mask.new_ones(rows.shape[:2]), mask], dim=1)
            yield model, {"inputs_embeds": torch.cat([rows, vectors], dim=1), "attention_mask": seen}

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor,
        prefix: Received | None = None,
    ) -> Tensor:
        """Next-token logits [batch, target, vocab] of `decoder_input_ids` [batch, target], each row as if alone.

        `attention_mask` marks the real tokens of `input_ids` [batch, source]; their padding may be on either side. That
        of `decoder_input_ids` has to be on the right, where no real token sees it.
        """
        if attention_mask is not None:
            input_ids, attention_mask = _real_first(input_ids, attention_mask)
        with self._reading(input_ids, attention_mask, prefix) as (model, source):
            logits: Tensor = model(**source, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        return logits

    def target_logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Received | None = None
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
            BackboneError: a prompt longer than the context, or than what `prefix` leaves of it.
        """
        self._refuse_too_long(max(map(len, prompts)), self.room_behind(prefix))
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

    def _refuse_too_long(self, longest: int, room: int | None) -> None:
        if room is not None and longest > room:
            whole = "the context" if room == self.context_length else "what the prompt leaves of the context"
            expected = f"at most {room} tokens, {whole}"
            raise BackboneError("prompt", expected=expected, found=f"{longest}", next_step="shorten it")

    def _written(
        self, prompts: Sequence[Sequence[int]], prefix: Injection | None, settings: GenerationConfig
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        rows = [[*prompt, *[settings.pad_token_id] * (width - len(prompt))] for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        read = torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)
        with self._reading(*read, prefix) as (model, source), without_habits(model):
            written = model.generate(**source, generation_config=settings)
        targets: list[list[int]] = written[:, 1:].tolist()
        return targets


def _real_first(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    # BART counts slots: padding in front would move its text.
    order = attention_mask.bool().int().argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
