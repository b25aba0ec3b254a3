"""Attention in a packed row: a token sees the slots of its own prefix, and its own example: in a decoder up to itself.

One rule says who sees whom, `visible` in a decoder and `around` in an encoder. On CUDA it goes into FlexAttention (Dong
et al. 2024, arXiv 2412.05496), which skips whatever block of the row holds nothing to see; elsewhere, where that has no
backward pass, it is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import PreTrainedModel

from prefixkit.backbones.geometry import is_encoder, looks_back
from prefixkit.backbones.positions import takes_positions
from prefixkit.errors import BackboneError
from prefixkit.injections import PackedPrefixes

Mask = Tensor | BlockMask
"""Of [1, 1, seq, slots + seq]."""
Visible = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""Whether a query sees a column: slots first, then the row. Batch and head, in front, make no difference."""
_BLOCK = 128
_COMPILATIONS = 64
_UNKNOWN = ("s_aux", "position_bias", "head_mask")
"""What attention is given in some models and a mask cannot express."""


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the attention of a model cannot keep the examples of a packed row apart; None where it can."""
    if not takes_positions(model):
        return "it takes no position ids"
    if not is_encoder(model.config) and not looks_back(model):
        return "its tokens see what follows them"
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    if _in_blocks(model) and not (model._supports_sdpa or capped):
        return "its attention does more than FlexAttention can be told"
    return None


def masks(
    packed: PackedPrefixes, windows: Iterable[int | None], model: PreTrainedModel, *, causal: bool = True
) -> dict[int | None, Mask]:
    """The mask of the layers with each of the sliding `windows`, as the attention of `model` wants it.

    Args:
        causal: tokens do not see what follows them, as in a decoder.
    """
    if _in_blocks(model):
        return {window: blocks(packed, window, causal) for window in windows}
    made = {window: dense(packed, window, causal) for window in windows}
    if model.config._attn_implementation.endswith("sdpa"):
        return dict(made)
    lowest = torch.finfo(model.dtype).min
    return {
        window: torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest) for window, mask in made.items()
    }


def _in_blocks(model: PreTrainedModel) -> bool:
    return bool(model.device.type == "cuda")


def visible(packed: PackedPrefixes, window: int | None) -> Visible:
    """Who sees whom; slot j of a prefix stands at j, token i of an example at its prefix's length + i."""
    owner, example = _columns(packed)
    place = torch.cat([packed.slot_places, packed.places])
    # A number for each query rather than one for all, so that FlexAttention is compiled for every window at once.
    last, before = packed.places, packed.places - (packed.places + 1 if window is None else window)

    def sees(_batch: Any, _head: Any, query: Tensor, column: Tensor) -> Tensor:
        own = (packed.owners[query] == owner[column]) | (packed.examples[query] == example[column])
        return own & (place[column] <= last[query]) & (place[column] > before[query])

    return sees


def around(packed: PackedPrefixes, window: int | None) -> Visible:
    """Who sees whom in both directions; a window is one of the text alone, all of whose tokens see their prefix."""
    owner, example = _columns(packed)
    place = torch.cat([packed.slot_places, packed.places])
    reach = torch.full_like(packed.places, len(packed.places) if window is None else window)

    def sees(_batch: Any, _head: Any, query: Tensor, column: Tensor) -> Tensor:
        near = (place[column] - packed.places[query]).abs() < reach[query]
        return (packed.owners[query] == owner[column]) | ((packed.examples[query] == example[column]) & near)

    return sees


def _columns(packed: PackedPrefixes) -> tuple[Tensor, Tensor]:
    """[slots + seq] each: the owners of slots and the examples of tokens, -1 where the other stands."""
    slots, tokens = torch.full_like(packed.slot_owners, -1), torch.full_like(packed.examples, -1)
    return torch.cat([packed.slot_owners, tokens]), torch.cat([slots, packed.examples])


def dense(packed: PackedPrefixes, window: int | None, causal: bool = True) -> Tensor:
    """`visible` or `around` for all pairs, [1, 1, seq, slots + seq]."""
    queries = torch.arange(len(packed.examples), device=packed.examples.device)
    columns = torch.arange(packed.length + len(queries), device=queries.device)
    return _rule(causal)(packed, window)(0, 0, queries[:, None], columns)[None, None]


def _rule(causal: bool) -> Callable[[PackedPrefixes, int | None], Visible]:
    return visible if causal else around


def blocks(packed: PackedPrefixes, window: int | None, causal: bool = True) -> BlockMask:
    """`visible` or `around` for FlexAttention: which blocks hold anything to see.

    That is read off what each begins and ends with. All pairs are never written out: of a row of 16384 tokens they
    would be 256 MiB.
    """
    owner, example = _columns(packed)
    seen = _overlap(packed.owners, owner) | _overlap(packed.examples, example)
    rows, columns = (torch.arange(length, device=seen.device) * _BLOCK for length in seen.shape)
    if causal:
        # No block of the row that begins behind the last query.
        seen = seen & (columns - packed.length < rows[:, None] + _BLOCK)
    order = seen.int().argsort(dim=-1, descending=True, stable=True)
    made: BlockMask = BlockMask.from_kv_blocks(
        seen.sum(-1, dtype=torch.int32)[None, None],
        order.int()[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=_rule(causal)(packed, window),
        seq_lengths=(len(packed.examples), len(owner)),
    )
    return made


def _overlap(queries: Tensor, columns: Tensor) -> Tensor:
    """[blocks, blocks]: whether numbers of the one may be among those of the other; -1 is nobody's."""
    first, last = _chunks(queries).aminmax(dim=1)
    known = _chunks(columns)
    lowest = known.masked_fill(known < 0, torch.iinfo(known.dtype).max).amin(dim=1)
    return (lowest <= last[:, None]) & (known.amax(dim=1) >= first[:, None])


def _chunks(numbers: Tensor) -> Tensor:
    """[blocks, block], the last one filled up with its last number."""
    missing = -len(numbers) % _BLOCK
    return torch.cat([numbers, numbers[-1:].expand(missing)]).view(-1, _BLOCK)


def attend(
    attention: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    **keywords: Any,
) -> Any:
    """What `attention` does, or FlexAttention where the mask is one of blocks.

    Raises:
        BackboneError: dropout, or what a mask of blocks cannot express.
    """
    if isinstance(mask, Tensor):
        return attention(module, query, key, value, mask, **keywords)
    extra = [name for name in _UNKNOWN if keywords.get(name) is not None]
    if keywords.get("dropout") or extra:
        found = ", ".join(extra) or "dropout in attention"
        raise BackboneError("packed row", expected="plain attention", found=found, next_step="use padded batches")
    # In a stack that is compiled as a whole it is compiled along.
    flex = flex_attention if torch.compiler.is_compiling() else _flex(query.device.type)
    attended = flex(
        query,
        key,
        value,
        block_mask=mask,
        score_mod=_capped(keywords.get("softcap")),
        scale=keywords.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).contiguous(), None


def _capped(cap: float | None) -> Callable[..., Tensor] | None:
    if cap is None:
        return None
    return lambda score, _batch, _head, _query, _column: cap * torch.tanh(score / cap)


@cache
def _flex(device: str) -> Any:
    """Uncompiled it writes all scores out: that is for tests, which want no compiler."""
    if device != "cuda":
        return flex_attention
    # About three for each model, with and without gradients. Beyond the limit, `fullgraph` makes it an error, where
    # attention would otherwise go on uncompiled and say nothing.
    config.recompile_limit = max(config.recompile_limit, _COMPILATIONS)
    return torch.compile(flex_attention, fullgraph=True)
