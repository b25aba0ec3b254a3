"""A decoder as a function of flat tensors that writes into buffers: what `--target cuda` is traced from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefixkit.backbones.positions import takes_positions
from prefixkit.export.buffer_attention import writing
from prefixkit.export.buffer_writing import Form, Writing
from prefixkit.serving.cache_scales import CacheScales


class BufferedDecoder(nn.Module):
    """`(input_ids, position_ids, write_index, last, buffers) -> (logits, token, key 0, value 0, …)`.

    Of each row, `write_index` [batch] is the slot of the first of `input_ids` [batch, seq], and `last` [batch] the
    place of its last real one: shorter rows are padded on the right, and the next pass writes over their padding.
    In the form `shared` there are two more arguments: the keys and values of a prefix [1, kv_heads, prefix, head_dim],
    and of each row how many of its slots it sees, all of them or none.
    `logits` [batch, vocab] are float32, of what follows that token; `token` [batch] is the likeliest.
    """

    def __init__(self, model: PreTrainedModel, form: Form, scales: CacheScales | None = None) -> None:
        super().__init__()
        self.model, self.form = model, form
        self.scales = nn.ParameterList([] if scales is None else map(torch.from_numpy, scales.tensors))
        self.positions = takes_positions(model)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        last: Tensor,
        buffers: list[Tensor],
        shared_length: Tensor | None = None,
        shared: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Run the model; see the class."""
        pairs, given = (list(zip(each[::2], each[1::2], strict=True)) for each in (buffers, shared))
        scales = list(zip(self.scales[::2], self.scales[1::2], strict=True))
        where, cache = Writing(self.form, write_index, pairs, given, shared_length, scales), DynamicCache()
        cache.layers = [_Fresh() for _ in pairs]
        keywords = {"position_ids": position_ids} if self.positions else {}
        with writing(self.model, where), _logits_at(self.model, last):
            logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **keywords).logits
        logits = logits[:, 0].float()
        written = [tensor for layer in range(len(pairs)) for tensor in where.written[layer]]
        return (logits, logits.argmax(dim=-1), *written)


class _Fresh(DynamicLayer):  # type: ignore[misc]
    """One layer's cache, which keeps nothing: attention itself writes into the buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


@contextmanager
def _logits_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Logits in a `with` block are [batch, 1, vocab]: those at `places` [batch]."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)

    def chosen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        states = inputs[0]
        return (states.gather(1, places[:, None, None].expand(-1, 1, states.shape[2])),)

    hook = head.register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()
