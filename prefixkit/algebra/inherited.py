"""What a derived prefix may say of its backbone and training: only what all its parents say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefixkit.format.manifest import BackboneIdentity
from prefixkit.prefix import Prefix

_HASHES = {"config_hash": "configuration", "weights_hash": "weights", "tokenizer_hash": "tokenizer"}


def shared_backbone(parents: Sequence[Prefix]) -> tuple[BackboneIdentity, tuple[str, ...]]:
    """The first one's backbone with the hashes that all parents state, and what to tell of the others.

    A prefix that was imported without its backbone does not know its weights; nor does what is made with it.
    """
    backbones = [parent.manifest.backbone for parent in parents]
    stated = {name: [getattr(backbone, name) is not None for backbone in backbones] for name in _HASHES}
    unknown = [name for name, known in stated.items() if any(known) and not all(known)]
    if not unknown:
        return backbones[0], ()
    told = " and ".join(_HASHES[name] for name in unknown)
    note = f"{told} of the backbone: not every part states a hash, so the result states none and it is not checked"
    nothing: dict[str, Any] = dict.fromkeys(unknown)
    return replace(backbones[0], **nothing), (note,)


def shared_rounding(parents: Sequence[Prefix]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How the weights were rounded in training (`quantize` of the provenance), and what to tell of a mixture."""
    kinds = [parent.manifest.provenance.config.get("quantize") for parent in parents]
    if all(kind == kinds[0] for kind in kinds):
        return ({} if kinds[0] is None else {"quantize": kinds[0]}), ()
    told = " and ".join(dict.fromkeys("weights as stored" if kind is None else f"{kind} weights" for kind in kinds))
    return {}, (f"trained on backbones of {told}; the result does not say which, and no command will warn of it",)
