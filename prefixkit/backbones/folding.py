"""Folding: a soft prompt as the keys and values that it leaves in every layer.

On a causal model this is exact: a prepended prompt sees nothing but itself, so its keys and values are the same before
every text. Training runs through it too: the prompt passes the model once a step, not once a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.geometry import is_encoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import EmbeddingPrompt, Injection, KeyValuePrefix, KeyValuePrefixes, records_of


def fold(model: PreTrainedModel, received: Injection) -> KeyValuePrefix:
    """The keys and values that `model` makes of `received`, with gradients; those of a key-value prefix are its own.

    Raises:
        MismatchError: vectors of another width than the model's.
        BackboneError: another injection, an encoder, or text that starts elsewhere than right behind the prompt: it has
            no keys and values of its own then.
    """
    if isinstance(received, KeyValuePrefix):
        return received
    if isinstance(received, EmbeddingPrompt) and received.placement != "prepend":
        found, step = "one in slots of the text", "`prefixkit train` and `prefixkit eval` run it"
        where = model.config.model_type
        raise BackboneError(where, expected="keys and values, or a prompt before the text", found=found, next_step=step)
    if not isinstance(received, EmbeddingPrompt):
        kinds = " and ".join(dict.fromkeys(record.kind for record in records_of(received)))
        several = isinstance(received, KeyValuePrefixes)
        where, found = model.config.model_type, "prefixes for an encoder-decoder" if several else kinds
        raise BackboneError(where, expected="keys and values, or a prompt, for a decoder", found=found)
    _refuse_unfoldable(model, received)
    cache = DynamicCache()
    vectors = received.embeddings.to(model.device, model.dtype)[None]
    keywords: dict[str, Any] = {"attention_mask": torch.ones(vectors.shape[:2], dtype=torch.long, device=model.device)}
    if takes_positions(model):
        keywords["position_ids"] = torch.arange(received.length, device=model.device)[None]
    decoder = model.get_decoder()
    spread = _is_spread(decoder)
    # `forward` goes past the hooks on the decoder: this pass receives nothing. Those of FSDP gather the weights.
    with _cached(model):
        states = (decoder if spread else decoder.forward)(
            inputs_embeds=vectors, past_key_values=cache, use_cache=True, **keywords
        ).last_hidden_state
    keys = [layer.keys[0] for layer in cache.layers]
    if spread:
        keys[-1] = _Behind.apply(keys[-1], states)  # type: ignore[no-untyped-call]
    return KeyValuePrefix(
        keys=tuple(keys),
        values=tuple(layer.values[0] for layer in cache.layers),
        positions=received.positions,
        stack=received.stack,
    )


def _refuse_unfoldable(model: PreTrainedModel, prompt: EmbeddingPrompt) -> None:
    if is_encoder(model.config):
        raise BackboneError(
            model.config.model_type,
            expected="keys and values for an encoder",
            found="a soft prompt, which sees the text there and has no keys and values of its own",
        )
    where, width = model.config.model_type, model.get_input_embeddings().embedding_dim
    if prompt.embeddings.shape[1] != width:
        found = f"{prompt.embeddings.shape[1]}"
        step = "use the backbone that the prompt was trained on"
        raise MismatchError(where, expected=f"prompt vectors of width {width}", found=found, next_step=step)
    if prompt.positions.text_start != prompt.length:
        found = f"text that starts at {prompt.positions.text_start}"
        raise BackboneError(where, expected=f"text that starts at {prompt.length}, behind the prompt", found=found)


def _is_spread(module: nn.Module) -> bool:
    # FSDP takes a second to import; who uses it has done so.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class _Behind(torch.autograd.Function):
    """A tensor whose gradient comes to the layer that made it only after one of zero came to what the layer gives.

    By the latter FSDP knows when to gather the weights again. Nobody uses what the last layer gives beside its keys.
    """

    @staticmethod
    def forward(context: Any, made: Tensor, given: Tensor) -> Tensor:
        context.save_for_backward(given)
        return made.view_as(made)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (given,) = context.saved_tensors
        return gradients[0], torch.zeros_like(given)


@contextmanager
def _cached(model: PreTrainedModel) -> Iterator[None]:
    """Layers that fill the cache: gradient checkpointing would leave it out. A prompt is short enough without."""
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointing:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True
