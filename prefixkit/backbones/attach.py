"""A prefix on a `transformers` model, in place: `attach` and `detach`.

After `attach` the same model object has a prefix and nothing else has changed: gradients, padding on either side, gradient
checkpointing, `generate`, `Trainer` and accelerate work as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.attention import AttentionRoute, uses_registry
from prefixkit.backbones.geometry import measure, refuse_swallowed
from prefixkit.backbones.identity import identify, origin
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import KeyValuePrefix, key_value_prefix
from prefixkit.prefix import Prefix, matches

_NAME = "prefixkit"


class MakesPrefix(Protocol):
    """A method: a module whose current parameters make a prefix."""

    def __call__(self) -> KeyValuePrefix: ...


class FixedPrefix(nn.Module):
    """A prefix that is not trained, as a method."""

    def __init__(self, prefix: KeyValuePrefix) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self) -> KeyValuePrefix:
        """The prefix."""
        return self.prefix


class Attachment:
    """One model and what it receives. Hooks on the base model place the prefix and shift the text's positions."""

    def __init__(self, model: PreTrainedModel, method: MakesPrefix | None = None) -> None:
        self.model, self.method = model, method
        self.route = AttentionRoute(model) if uses_registry(model) else None
        if self.route is not None:
            self.route.install()
        # The decoder itself, not `base_model`: some models (OPT) call it directly.
        self._hook = model.get_decoder().register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        self._hook.remove()
        if self.route is not None:
            self.route.remove()

    def _before(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        prefix = self.method() if self.method is not None else None
        tokens = arguments[0] if arguments else keywords.get("input_ids")
        tokens = keywords["inputs_embeds"] if tokens is None else tokens
        if self.route is None:
            if prefix is not None and prefix.length:
                _through_cache(self.model, prefix, tokens, keywords)
            return arguments, keywords
        self.route.injected.keys = prefix.keys if prefix is not None else ()
        self.route.injected.values = prefix.values if prefix is not None else ()
        start = prefix.positions.text_start if prefix is not None else 0
        index = _query_index(tokens, keywords)
        self.route.injected.query_index = index.clamp(min=0)
        keywords["position_ids"] = index.clamp(min=0) + start
        return arguments, keywords


def _query_index(tokens: Tensor, keywords: dict[str, Any]) -> Tensor:
    """[batch, seq]: how many real tokens of its row precede each query token; -1 or repeated on padding."""
    given: Tensor | None = keywords.get("position_ids")
    if given is not None:
        return given
    batch, seq = tokens.shape[:2]
    mask = keywords.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1)[:, -seq:]
    cache = keywords.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(seq, device=tokens.device) + past).expand(batch, -1)


def _through_cache(model: PreTrainedModel, prefix: KeyValuePrefix, tokens: Tensor, keywords: dict[str, Any]) -> None:
    """For models outside the attention registry: the prefix is the beginning of the cache, and the mask covers it."""
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise BackboneError(
            model.config.model_type,
            expected="a model in the attention registry of transformers under gradient checkpointing",
            found="one that takes a prefix only through its cache, which checkpointing drops",
            next_step="call gradient_checkpointing_disable()",
        )
    batch, seq = tokens.shape[:2]
    cache = keywords.get("past_key_values")
    cache = DynamicCache() if cache is None else cache
    past = cache.get_seq_length()
    if past == 0:
        _fill(cache, prefix, batch, _float_dtype(model))
        past = prefix.length
    mask = keywords.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past - prefix.length + seq, dtype=torch.long, device=tokens.device)
    ones = torch.ones(batch, prefix.length, dtype=mask.dtype, device=mask.device)
    if _takes_positions(model):
        index = _query_index(tokens, {**keywords, "attention_mask": mask}).clamp(min=0)
        keywords["position_ids"] = index + prefix.positions.text_start
    keywords.update(past_key_values=cache, attention_mask=torch.cat([ones, mask], dim=-1))


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.get_decoder().forward).parameters


def _float_dtype(model: PreTrainedModel) -> torch.dtype:
    return next(parameter.dtype for parameter in model.base_model.parameters() if parameter.is_floating_point())


def _fill(cache: Any, prefix: KeyValuePrefix, batch: int, dtype: torch.dtype) -> None:
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key.to(dtype).expand(batch, -1, -1, -1), value.to(dtype).expand(batch, -1, -1, -1), layer)


def attach(
    model: PreTrainedModel,
    prefix: Prefix | KeyValuePrefix | nn.Module,
    *,
    freeze: bool = True,
    allow_mismatch: bool = False,
) -> PreTrainedModel:
    """Give `model` a fixed prefix, or the trainable one that a method makes, in place.

    The method becomes the submodule `model.prefixkit`, so optimizers, `Trainer` and `state_dict` see its parameters.
    A loaded file is checked against the backbone that the model was loaded from; a model that came from no folder can only
    be checked by its geometry.

    Args:
        model: a decoder of `transformers`.
        prefix: a loaded file, a `KeyValuePrefix`, or a method such as `methods.prefix_tuning.PrefixTuning`.
        freeze: stop gradients into the backbone's parameters (`detach` restores what they were).
        allow_mismatch: take a file that was made for other weights, as long as the shapes fit.

    Returns:
        The same model.

    Raises:
        BackboneError: the model has a prefix already, or a sliding window would swallow this one.
        MismatchError: the prefix has other layers or shapes than the model, or was made for another backbone.
    """
    if hasattr(model, _NAME):
        raise BackboneError(model.config.model_type, found="a prefix that is attached already", next_step="detach it first")
    if isinstance(prefix, Prefix):
        if not allow_mismatch:
            check_origin(prefix, model)
        prefix = key_value_prefix(prefix)
    method = FixedPrefix(prefix) if isinstance(prefix, KeyValuePrefix) else prefix
    with torch.no_grad():
        check_fits(model, method())
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if freeze:
        model.requires_grad_(False)
    attachment = Attachment(model, method)  # type: ignore[arg-type]
    model.add_module(_NAME, method)
    model.__dict__["_prefixkit_undo"] = _undo(model, attachment, required)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the prefix off; the model computes and trains what it did before `attach`.

    Raises:
        BackboneError: nothing is attached.
    """
    if not hasattr(model, _NAME):
        raise BackboneError(model.config.model_type, expected="an attached prefix", found="none")
    model.__dict__.pop("_prefixkit_undo")()
    return model


def _undo(model: PreTrainedModel, attachment: Attachment, required: dict[str, bool]) -> Callable[[], None]:
    def undo() -> None:
        delattr(model, _NAME)
        attachment.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])

    return undo


def check_origin(prefix: Prefix, model: PreTrainedModel) -> None:
    """Refuse a file made for another backbone, where the folder that `model` was loaded from is known.

    Raises:
        MismatchError: another configuration or other weights.
    """
    folder = origin(model.config)
    if folder is not None:
        geometry = measure(model, model.config.model_type)
        matches(prefix, identify(folder, folder.name, None, model.config, geometry))


def check_fits(model: PreTrainedModel, prefix: KeyValuePrefix) -> None:
    """Refuse a prefix whose layers or shapes are not the model's.

    Raises:
        MismatchError: another number of layers, or other key and value shapes.
        BackboneError: a sliding window would swallow the prefix.
    """
    where = model.config.model_type
    geometry = measure(model, where)
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in geometry]
    found = [
        (key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]
    if expected != found:
        raise MismatchError(
            where,
            expected=f"{len(expected)} layers of (kv_heads, key_dim, value_dim) {expected[0]}",
            found=f"{len(found)} layers of {found[0]}",
            next_step="use the backbone that the prefix was trained on",
        )
    refuse_swallowed(geometry, prefix.length, where)
