"""A file with keys and values in the place of whatever has its own: what a graph takes, and what its folder holds."""

from __future__ import annotations

from dataclasses import replace

import torch

from prefixkit import __version__
from prefixkit.backbones.backbone import Backbone
from prefixkit.injections import injection, records_of
from prefixkit.prefix import Prefix


@torch.no_grad()
def folded_file(prefix: Prefix, backbone: Backbone) -> Prefix:
    """`prefix` folded by `backbone`, naming it as its parent; `prefix` itself where nothing is to be folded."""
    made, manifest = backbone.fold(injection(prefix)), prefix.manifest
    injections = records_of(made)
    if injections == manifest.injections:
        return prefix
    parents = (manifest.content,) if manifest.content is not None else manifest.provenance.parents
    provenance = replace(manifest.provenance, prefixkit=__version__, parents=parents)
    return Prefix(replace(manifest, injections=injections, provenance=provenance, content=None), made.arrays())
