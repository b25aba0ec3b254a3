"""An encoder-decoder as two functions of flat tensors, which is what two graphs can be traced from.

Where the decoder's own code counts slots (BART's positions, T5's bias by distance), these count real tokens of the
text: padding and prefix slots may then lie anywhere before it, and differ from row to row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from prefixkit.backbones.masks import causal_mask
from prefixkit.export.pair_attention import KEYWORD, Given
from prefixkit.export.relative_bias import RelativeBias, biased
from prefixkit.export.wrapper import PastLayer


class FlatEncoder(nn.Module):
    """`(input_ids, attention_mask, prefix) -> (last_hidden_state, cross key 0, cross value 0, …)`.

    `input_ids` [batch, seq] are padded on the right. `prefix` lists the key and value of each encoder layer, [batch,
    kv_heads, prefix, head_dim]; `attention_mask` is [batch, prefix + seq]. The rest of the output is what each of the
    decoder's cross-attentions sees of the text, [batch, kv_heads, seq, head_dim].
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.bias = RelativeBias.of(model.get_encoder())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prefix: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the encoder, and each cross-attention's projections of what it read; see the class."""
        pairs = iter(list(zip(prefix[0::2], prefix[1::2], strict=True)))
        mask = _additive(attention_mask, prefix[0].dtype)
        with self._placed(input_ids.shape[1], prefix[0].shape[2]):
            read = self.model.get_encoder()(
                input_ids=input_ids, attention_mask=mask, **{KEYWORD: Given(before=pairs)}
            ).last_hidden_state
        return read, *self._cross(input_ids[:, :1], read)

    @contextmanager
    def _placed(self, seq: int, prefix: int) -> Iterator[None]:
        if self.bias is None:
            yield
            return
        positions = torch.arange(seq, device=self.model.device)[None]
        with _bias_is(self.model.get_encoder(), F.pad(self.bias(positions, positions), (prefix, 0))):
            yield

    def _cross(self, token: Tensor, read: Tensor) -> list[Tensor]:
        """Keys and values by layer. The decoder runs for them; what it makes of the token is not in the graph."""
        seen: list[Tensor] = []
        nothing_hidden = torch.zeros_like(token, dtype=read.dtype)[:, None, None]
        self.model.get_decoder()(
            input_ids=token,
            attention_mask=nothing_hidden,
            encoder_hidden_states=read,
            encoder_attention_mask=nothing_hidden,
            use_cache=False,
            **{KEYWORD: Given(seen=seen)},
        )
        return seen


class FlatPairDecoder(nn.Module):
    """`(input_ids, attention_mask, encoder_attention_mask, prefix_length, past, cross) -> (logits, present key 0, …)`.

    `past` lists the key and value of each layer, [batch, kv_heads, past, head_dim], `cross` those of what was read,
    [batch, kv_heads, cross, head_dim]. The masks are [batch, past + seq] and [batch, cross]. The first `prefix_length`
    slots of the past hold prefixes and their padding; they take no positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.bias = RelativeBias.of(model.get_decoder())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_attention_mask: Tensor,
        prefix_length: Tensor,
        past: list[Tensor],
        cross: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run the decoder and its head; see the class."""
        own = _cache(past)
        cache = EncoderDecoderCache(own, _cache(cross))
        cache.is_updated = dict.fromkeys(range(len(own.layers)), True)
        text = torch.arange(attention_mask.shape[1], device=attention_mask.device) >= prefix_length
        positions = ((attention_mask * text).cumsum(-1) - 1).clamp(min=0)
        with self._placed(positions[:, -input_ids.shape[1] :], positions, text):
            logits = self.model(
                # Its keys and values are in the cache already.
                encoder_outputs=BaseModelOutput(last_hidden_state=past[0].new_zeros(1, 1, 1)),
                attention_mask=_additive(encoder_attention_mask, past[0].dtype),
                decoder_input_ids=input_ids,
                decoder_attention_mask=causal_mask(attention_mask, input_ids.shape[1], past[0].dtype),
                past_key_values=cache,
                use_cache=True,
            ).logits
        return (logits.float(), *(tensor for layer in own.layers for tensor in (layer.keys, layer.values)))

    @contextmanager
    def _placed(self, queries: Tensor, keys: Tensor, text: Tensor) -> Iterator[None]:
        """With the positions [batch, seq] of the queries and of all keys; keys that are no `text` have none."""
        decoder = self.model.get_decoder()
        if self.bias is not None:
            with _bias_is(decoder, torch.where(text, self.bias(queries, keys), 0.0)):
                yield
            return
        table = decoder.embed_positions
        positions = F.embedding(queries + table.offset, table.weight)
        with _replaced(table, "forward", lambda *_, **__: positions):
            yield


def _cache(tensors: Sequence[Tensor]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [PastLayer(key, value) for key, value in zip(tensors[0::2], tensors[1::2], strict=True)]
    return cache


def _additive(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, slots] -> [batch, 1, 1, slots]: nothing for real ones, the least number for padding."""
    return torch.where(attention_mask.bool(), 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]


@contextmanager
def _bias_is(stack: nn.Module, bias: Tensor) -> Iterator[None]:
    module = biased(stack)
    assert module is not None
    with _replaced(module, "compute_bias", lambda *_, **__: bias):
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
