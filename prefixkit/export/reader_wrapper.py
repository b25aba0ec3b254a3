"""A model that reads as a function of tensors by name, which is what a graph can be traced from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefixkit.backbones.geometry import reader_of
from prefixkit.backbones.heads import read
from prefixkit.backbones.hidden import layers_of
from prefixkit.export.pair_attention import KEYWORD, Given
from prefixkit.export.reader_masks import masks
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.export.reader_rows import chosen, filled, inserted, without
from prefixkit.export.wrapper import FlatDecoder
from prefixkit.injections import TaskHead
from prefixkit.serving.reader_names import past_names
from prefixkit.serving.report import ReaderParts

Inputs = Mapping[str, Tensor]
Outputs = tuple[Tensor, Tensor | None]
"""Final states [batch, seq, hidden] of the input's own tokens, and a language model's logits of them."""


class FlatReader(nn.Module, ABC):
    """`tensors -> (last_hidden_state,)`, with `logits` behind it where there is a head.

    The tensors are those that `plan` names, see `prefixkit.serving.reader_names`, then the keys and values of a prefix.
    """

    def __init__(self, backbone: ReadingBackbone, plan: ReaderParts) -> None:
        super().__init__()
        self.model, self.plan = backbone.release(), plan
        self.words = plan.logits and plan.head is None
        self.past = list(past_names(backbone.geometry))

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the model, then the head that there is; see the class."""
        inputs = dict(zip((*self.plan.inputs, *self.past), tensors, strict=True))
        states, logits = self._outputs(inputs)
        if self.plan.head is None:
            return (states,) if logits is None else (states, logits.float())
        head = TaskHead(weight=inputs["head.weight"], bias=inputs["head.bias"], reads=self.plan.head)
        return states, read(head, states, self._real(inputs))

    @abstractmethod
    def _outputs(self, inputs: Inputs) -> Outputs:
        """What the model makes of the input."""

    def _real(self, inputs: Inputs) -> Tensor | None:
        """[batch, seq]: 1 for the input's own tokens, 0 for padding; None for images, which have none."""
        return self._own(inputs["attention_mask"][:, self._prefix(inputs) :], inputs)

    def _prefix(self, inputs: Inputs) -> int:
        return inputs[self.past[0]].shape[2]

    def _own(self, each: Tensor, inputs: Inputs) -> Tensor:
        """`each` [batch, placed, …], without the prompt's rows."""
        rows = inputs.get("prompt_embeddings")
        return each if rows is None else without(self.plan.placement, rows, each)

    def _placed(self, numbers: Tensor, inputs: Inputs) -> Tensor:
        """`numbers` [batch, seq], with 0 for the prompt's rows."""
        rows = inputs.get("prompt_embeddings")
        if rows is None:
            return numbers
        return inserted(self.plan.placement, torch.zeros_like(rows[..., 0], dtype=numbers.dtype), numbers)

    def _run(self, inputs: Inputs, real: Tensor, **keywords: Any) -> Outputs:
        """Call an encoder; `real` [batch, prefix + placed] is 1 where there is something to see."""
        past = [inputs[name] for name in self.past]
        before = iter(list(zip(past[0::2], past[1::2], strict=True)))
        keywords[KEYWORD] = Given(before=before, masks=masks(self.model, real, past[0].shape[2], past[0].dtype))
        reader = reader_of(self.model)
        if not self.words:
            return self._own(reader(**keywords).last_hidden_state, inputs), None
        states: list[Tensor] = []
        hook = reader.register_forward_hook(lambda *of: states.append(of[2].last_hidden_state))
        try:
            logits = self.model(**keywords).logits
        finally:
            hook.remove()
        return self._own(states[0], inputs), self._own(logits, inputs)

    @contextmanager
    def _added(self, inputs: Inputs, which: Tensor | None) -> Iterator[None]:
        """The layers with row `which` [batch, placed] of `hidden_prompts` added, counted from 1; 0 is none."""
        hooks = []
        for index, layer in enumerate(layers_of(self.model) if which is not None else ()):
            assert which is not None
            hooks.append(layer.register_forward_pre_hook(_adding(chosen(inputs["hidden_prompts"][:, index], which))))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class DecoderReader(FlatReader):
    """A decoder below a head: the prefix is its past."""

    def __init__(self, backbone: ReadingBackbone, plan: ReaderParts) -> None:
        super().__init__(backbone, plan)
        self.flat = FlatDecoder(self.model, backbone.geometry)

    def _outputs(self, inputs: Inputs) -> Outputs:
        ids, past = inputs["input_ids"], [inputs[name] for name in self.past]
        positions = inputs.get("position_ids", ids)
        arguments = self.flat.arguments(ids, inputs["attention_mask"], positions, self.flat.cache(past), past[0].dtype)
        if self.plan.placement == "slots":
            del arguments["input_ids"]
            vectors = self.model.get_input_embeddings()(ids.clamp(min=0))
            arguments["inputs_embeds"] = filled(vectors, ids, inputs["prompt_embeddings"])
        return reader_of(self.model)(**arguments).last_hidden_state, None


def _adding(rows: Tensor) -> Any:
    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = arguments
        return (states + rows, *others)

    return before
