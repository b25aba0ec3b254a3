"""What a model has attached, as the content of a prefix file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from prefixkit import __version__
from prefixkit.backbones.attach import stacks_of
from prefixkit.backbones.attachment import NAME
from prefixkit.backbones.folding import fold
from prefixkit.backbones.geometry import is_encoder, windows
from prefixkit.backbones.identity import identify, origin
from prefixkit.backbones.weights import is_pair
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry, Manifest, Provenance, TaskRecord
from prefixkit.injections import Injection, KeyValuePrefix, TaskHead, joined, parts_of, records_of
from prefixkit.prefix import Prefix


@torch.no_grad()
def snapshot(
    model: PreTrainedModel,
    *,
    method: str = "prefix-tuning",
    task: TaskRecord | None = None,
    head: TaskHead | None = None,
) -> Prefix:
    """The prefix that `model.prefixkit` makes at the moment, for its backbone; `prefixkit.save` writes it.

    Args:
        model: a model that `attach` gave a prefix; its backbone must be what its folder holds, so it stayed frozen.
        method: what trained it, for the provenance.
        task: what it was trained to read and write; without it `generate` and `eval` do not know how to prompt.
        head: what was trained beside it. A file's head reads final states: that of `AutoModelForTokenClassification` is
            `TaskHead(weight=model.classifier.weight, bias=model.classifier.bias, reads="each")`.

    Raises:
        BackboneError: nothing is attached, or the model was not loaded from a folder or the hub, so that the file could
            not say which weights it needs.
    """
    attached = getattr(model, NAME, None)
    if attached is None:
        raise BackboneError(model.config.model_type, expected="an attached prefix", found="none")
    injection = attached()
    whole = joined((*parts_of(injection), *([head] if head is not None else [])))
    manifest = Manifest(
        backbone=_identity(model, injection),
        injections=records_of(whole),
        provenance=Provenance(method=method, prefixkit=__version__),
        task=task,
    )
    return Prefix(manifest, whole.arrays())


def _identity(model: PreTrainedModel, injection: Injection) -> BackboneIdentity:
    if is_pair(model.config):
        stacks = stacks_of(model)
        return identity_of(model, stacks["decoder"], encoder=stacks["encoder"])
    geometry = _geometry(model, fold(model, injection))
    if is_encoder(model.config):
        return identity_of(model, (), encoder=geometry)
    return identity_of(model, geometry)


def identity_of(
    model: PreTrainedModel, decoder: tuple[LayerGeometry, ...], encoder: tuple[LayerGeometry, ...] = ()
) -> BackboneIdentity:
    """The identity of the backbone that `model` was loaded from, with the geometry that was measured.

    Raises:
        BackboneError: it was loaded from no folder, nor from the hub.
    """
    config = model.config
    folder = origin(config)
    if folder is None:
        raise BackboneError(
            config.model_type,
            expected="a model loaded from a folder or the hub",
            found="one built in memory",
            next_step="save it with save_pretrained and load it from there",
        )
    source = config._name_or_path
    name = folder.name if Path(source).is_dir() else source
    return identify(folder, name, getattr(config, "_commit_hash", None), config, decoder, encoder=encoder)


def _geometry(model: PreTrainedModel, prefix: KeyValuePrefix) -> tuple[LayerGeometry, ...]:
    # `attach` made sure that the prefix has the shapes of the model.
    wide = [None] * len(prefix.keys) if is_encoder(model.config) else windows(model.config)
    layers = zip(prefix.keys, prefix.values, wide, strict=True)
    return tuple(
        LayerGeometry(kv_heads=key.shape[0], key_dim=key.shape[2], value_dim=value.shape[2], window=window)
        for key, value, window in layers
    )
