"""A prefix on a `transformers` model, in place: `attach` and `detach`.

After `attach` the same model object has a prefix and nothing else has changed: gradients, padding on either side,
gradient checkpointing, `generate`, `Trainer` and accelerate work as before.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from prefixkit.backbones.attachment import NAME, Attachment, FixedPrefix, PairAttachment, refuse_unready
from prefixkit.backbones.attention import ATTACHMENT
from prefixkit.backbones.encoder_layers import measure_encoder
from prefixkit.backbones.folding import fold
from prefixkit.backbones.geometry import is_encoder, measure, refuse_swallowed
from prefixkit.backbones.identity import context_length, identify, origin
from prefixkit.backbones.pair import fitting
from prefixkit.backbones.positions import first_position, refuse_unplaceable
from prefixkit.backbones.stacks import measure_stacks
from prefixkit.backbones.weights import is_pair
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry
from prefixkit.injections import Injection, KeyValuePrefix, injection
from prefixkit.prefix import Prefix, matches


def attach(
    model: PreTrainedModel,
    prefix: Prefix | Injection | nn.Module,
    *,
    freeze: bool = True,
    allow_mismatch: bool = False,
) -> PreTrainedModel:
    """Give `model` a fixed prefix, or the trainable one that a method makes, in place.

    The method becomes the submodule `model.prefixkit`, so optimizers, `Trainer` and `state_dict` see its parameters,
    and `save_pretrained` writes them beside the backbone's; `snapshot` makes a prefix file of them. A loaded file is
    checked against the backbone that the model was loaded from; a model from no folder by its geometry only.

    The caller goes on as without a prefix: position ids, masks and caches count the text alone. Attention dropout acts
    on prefix slots too. Begin caches after `attach`. Falcon and Bloom take a prefix through their cache, so they
    refuse static caches and gradient checkpointing; every architecture refuses reentrant checkpointing.

    Args:
        model: a decoder of `transformers`, an encoder of text or images, or an encoder-decoder (BART, T5), with any
            head on it, computing attention with sdpa or eager.
        prefix: a loaded file, a `KeyValuePrefix`, an `EmbeddingPrompt` (folded once, here), or a method such as
            `methods.prefix_tuning.PrefixTuning`; for an encoder-decoder a file with prefixes, `KeyValuePrefixes`, or
            `methods.prefix_tuning.PrefixesTuning`.
        freeze: stop gradients into the backbone's parameters, heads included (`detach` lets flow what flowed before).
        allow_mismatch: take a file that was made for other weights, as long as the shapes fit.

    Returns:
        The same model.

    Raises:
        BackboneError: the model has a prefix already, or cannot take this one: its attention implementation, a sliding
            window that would swallow the prefix, no positions left for text, or none that it could be given, slots of a
            task that it does not know.
        MismatchError: the prefix has other layers or shapes than the model, or was made for another backbone.
    """
    refuse_unready(model)
    if isinstance(prefix, Prefix):
        if not allow_mismatch:
            check_origin(prefix, model)
        prefix = injection(prefix)
    kept, kind = (fitting, PairAttachment) if is_pair(model.config) else (_kept, Attachment)
    with torch.no_grad():
        method = prefix if isinstance(prefix, nn.Module) else FixedPrefix(kept(model, prefix))
        kept(model, method())
    attachment = kind(model, method)
    if freeze:
        attachment.freeze()
    # Weights that accelerate keeps elsewhere are on "meta", which holds no numbers.
    model.add_module(NAME, method if model.device.type == "meta" else method.to(model.device))
    return model


def _kept(model: PreTrainedModel, received: Injection) -> KeyValuePrefix:
    prefix = fold(model, received)
    check_fits(model, prefix)
    return prefix


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the prefix off; the model computes and trains what it did before `attach`.

    Raises:
        BackboneError: nothing is attached.
    """
    if not hasattr(model, NAME):
        raise BackboneError(model.config.model_type, expected="an attached prefix", found="none")
    delattr(model, NAME)
    model.__dict__[ATTACHMENT].remove()
    return model


def check_origin(prefix: Prefix, model: PreTrainedModel) -> None:
    """Refuse a file made for another backbone, where the folder that `model` was loaded from is known.

    Raises:
        MismatchError: another configuration or other weights.
    """
    folder = origin(model.config)
    if folder is not None:
        matches(prefix, _identified(model, folder))


def stacks_of(model: PreTrainedModel) -> dict[str, tuple[LayerGeometry, ...]]:
    """The geometry of an encoder-decoder's stacks, measured anew where nothing is attached."""
    attachment = model.__dict__.get(ATTACHMENT)
    if isinstance(attachment, PairAttachment):
        return attachment.geometry
    return measure_stacks(model, model.config.model_type)


def _identified(model: PreTrainedModel, folder: Path) -> BackboneIdentity:
    if is_pair(model.config):
        stacks = stacks_of(model)
        return identify(folder, folder.name, None, model.config, stacks["decoder"], encoder=stacks["encoder"])
    if is_encoder(model.config):
        return identify(folder, folder.name, None, model.config, (), encoder=measure_encoder(model))
    return identify(folder, folder.name, None, model.config, measure(model, model.config.model_type))


def check_fits(model: PreTrainedModel, prefix: KeyValuePrefix) -> None:
    """Refuse a prefix whose layers or shapes are not the model's.

    Raises:
        MismatchError: another number of layers, or other key and value shapes.
        BackboneError: it stands in slots of the text, a sliding window would swallow it, no position is left for text,
            or the model cannot place text where the prefix wants it.
    """
    where = model.config.model_type
    stack = "encoder" if is_encoder(model.config) else "decoder"
    if prefix.stack != stack:
        raise MismatchError(where, expected=f"a prefix of an {stack}", found=f"one of an {prefix.stack}")
    if prefix.placement != "prepend":
        runs = "`prefixkit train` and `prefixkit eval` run it"
        expects, among = "a prefix before the text", "one in slots of the text"
        raise BackboneError(where, expected=expects, found=among, next_step=runs)
    geometry = measure_encoder(model) if stack == "encoder" else measure(model, where)
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in geometry]
    found = [
        (key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]
    step = "use the backbone that the prefix was trained on"
    if len(expected) != len(found):
        raise MismatchError(where, expected=f"{len(expected)} layers", found=f"{len(found)}", next_step=step)
    for index, shapes in enumerate(zip(expected, found, strict=True)):
        if shapes[0] != shapes[1]:
            named = f"layer {index} with (kv_heads, key_dim, value_dim) {shapes[0]}"
            raise MismatchError(where, expected=named, found=f"{shapes[1]}", next_step=step)
    refuse_swallowed(geometry, prefix.length, where)
    refuse_unplaceable(model, prefix.positions, prefix.length)
    room, start = context_length(model.config), prefix.positions.text_start
    if room is not None and start >= room - first_position(model):
        raise BackboneError(
            where,
            expected=f"a prefix that leaves room in the model's {room} positions",
            found=f"text that starts at {start}",
            next_step="use a shorter prefix",
        )
