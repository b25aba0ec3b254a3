"""A frozen model of either kind, `Decoder` or `EncoderDecoder`: what training and evaluation ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from prefixkit.backbones.compiled import restore_stacks
from prefixkit.backbones.deltas import biases, changed, normalizations
from prefixkit.backbones.geometry import reader_of
from prefixkit.backbones.last_layer import last_mlp_at
from prefixkit.backbones.onednn import multiply_by_torch
from prefixkit.backbones.recomputation import keep
from prefixkit.backbones.short_attention import attend_by_torch
from prefixkit.backbones.targets import Output, Targets
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.injections import Injection, KeyValuePrefix, KeyValuePrefixes, Received


@dataclass
class Backbone(ABC):
    """A model with frozen weights.

    Attributes:
        paired: whether prompt and target are two sequences, one for each stack, or one that goes on.
        model: the `transformers` model, in eval mode, without gradients.
        folder: where it was loaded from.
        identity: what a prefix file says of it.
        shares_beginnings: whether `reads_tries` may be true.
    """

    paired: ClassVar[bool]
    model: PreTrainedModel
    folder: Path
    identity: BackboneIdentity
    shares_beginnings: bool = field(default=False, init=False)
    _output_known: bool | None = field(default=None, init=False, repr=False)
    """Whether we know what follows the output layer; None before it was needed."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The kind: `decoder`, `encoder`, `encoder-decoder` or `vision`."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def context_length(self) -> int | None:
        """Positions that a stack knows; None where they have no end."""
        return self.identity.context_length

    @property
    def reads_tries(self) -> bool:
        """Whether what texts of a batch begin with alike is computed once; see `prefixkit.backbones.trie`."""
        return False

    @property
    def hidden_size(self) -> int:
        """The width of token vectors."""
        return self.identity.hidden_size

    @property
    def vocabulary(self) -> Tensor:
        """[vocab, hidden]: the vector of every token, after the model's embedding scale."""
        table = self.model.get_input_embeddings()
        vectors: Tensor = table(torch.arange(table.num_embeddings, device=self.device))
        return vectors.detach()

    @property
    def layers(self) -> int:
        """The layers of the stack that reads: the encoder's, or those of a decoder alone."""
        stacks = self.identity.stacks
        return len(stacks.get("encoder", stacks.get("decoder", ())))

    @property
    def patch_numbers(self) -> int:
        """How many numbers a patch of an image is made of. Raises BackboneError where there are no images."""
        raise BackboneError(self.identity.family, expected="an encoder of images", found=f"an {self.kind}")

    def parameter_shapes(self, which: str, *, reading: bool = False) -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters of a kind, by the names that a prefix file gives them.

        Args:
            which: `bias`, or `layernorm` for the scales and biases of every normalisation.
            reading: only those that the final states depend on, none of a language model's head.
        """
        chosen = biases(self.model) if which == "bias" else normalizations(self.model)
        inside = {id(weight) for weight in (reader_of(self.model) if reading else self.model).parameters()}
        return {name: tuple(weight.shape) for name, weight in chosen.items() if id(weight) in inside}

    @property
    @abstractmethod
    def longest_text(self) -> int | None:
        """Tokens that `key_values_of` takes at most; None without a limit."""

    @abstractmethod
    def room_for_text(self, length: int) -> int | None:
        """Positions that a prefix of `length` slots leaves for text; None where they have no end.

        Raises:
            BackboneError: a sliding window would swallow the prefix.
        """

    @abstractmethod
    def room_behind(self, prefix: Injection | None) -> int | None:
        """Positions that `prefix` leaves for text; None where they have no end."""

    @abstractmethod
    def refuse_unplaceable(self, received: Injection) -> None:
        """Raise BackboneError for a prefix whose text the model cannot place where it should start."""

    @abstractmethod
    def fold(self, received: Injection) -> Injection:
        """`received` with keys and values in the place of whatever has its own, for the same result."""

    @abstractmethod
    def states(self, inputs: Mapping[str, Tensor], received: Received | None = None) -> Tensor:
        """The final states [batch, seq, hidden] of the input's own tokens, after the last normalisation.

        Args:
            inputs: `input_ids` and `attention_mask` [batch, seq], or `pixel_values` [batch, channels, height, width].
        """

    @abstractmethod
    def key_values_of(self, token_ids: list[int]) -> KeyValuePrefix | KeyValuePrefixes:
        """The keys and values of a real text, wherever a prefix can stand."""

    @abstractmethod
    def target_logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Received | None = None
    ) -> Tensor:
        """The logits [tokens, vocab] that predict the tokens of `labels` that are not -100, row by row."""

    @contextmanager
    def targets(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, prefix: Received | None = None
    ) -> Iterator[Targets]:
        """What `target_logits` are made of, for losses that need not see all of them at once.

        Deltas are in the output layer for the length of the `with` block.
        """
        inputs = (input_ids, attention_mask, labels, prefix)
        output = Output(self.model)
        if self._output_known is not False:
            with changed(self.model, prefix):
                with output.kept() as kept:
                    row = self.target_logits(*inputs)
                if self._output_known is None:
                    self._output_known = output.matches(kept[0], row)
                if self._output_known:
                    yield output.targets(kept[0], row)
                    return
        logits = self.target_logits(*inputs)
        yield Targets(logits, lambda some: some, logits.shape[-1])

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prefix: Injection | None = None,
        *,
        stop: Sequence[int],
        max_new_tokens: int,
        num_beams: int = 1,
    ) -> list[list[int]]:
        """What the model writes for each prompt, as if that prompt were alone, up to the first stop token."""

    def release(self) -> PreTrainedModel:
        """The model as `transformers` made it: without our hooks or attention, nothing compiled or computed again."""
        restore_stacks(self.model)
        keep(self.model)
        multiply_by_torch(self.model)
        # An attachment gives back the attention that it found, which is ours.
        model = self._unhooked()
        attend_by_torch(model)
        return model

    def _unhooked(self) -> PreTrainedModel:
        """The model without our hooks, which come back when it is next given something."""
        for name in ("_attachment", "_stacks"):
            if name in self.__dict__:
                getattr(self, name).remove()
                del self.__dict__[name]
        return self.model

    @contextmanager
    def _logits_only_at(self, chosen: Tensor, places: Tensor | None = None) -> Iterator[None]:
        """Logits in a `with` block are [1, chosen, vocab]: those where `chosen` [batch, seq] is True.

        Of a single row with `places` [tokens], some of them more than once, they are [1, tokens, vocab], of each place.
        """
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)

        def before(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            # Where a place is taken often, gradients of indexing add up in bfloat16: the 257th would add nothing.
            return (given[0][chosen][None] if places is None else given[0][0].index_select(0, places)[None],)

        # In front of whatever else looks at what the head is given.
        hook = head.register_forward_pre_hook(before, prepend=True)
        try:
            with last_mlp_at(self.model, chosen):
                yield
        finally:
            hook.remove()


@contextmanager
def without_habits(model: PreTrainedModel) -> Iterator[None]:
    """Without a checkpoint's own generation settings, which fill in whatever a caller leaves open.

    BART's forbid repetitions and force tokens, those of instruction-tuned decoders penalise and sample.
    """
    habits = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = habits
