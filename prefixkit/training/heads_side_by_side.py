"""What the heads of several runs answer in one pass, each on its own rows: labels and tags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.heads import read_each
from prefixkit.data.batches import IGNORED
from prefixkit.data.labelled_batches import LabelledBatch
from prefixkit.injections import KeyValuePrefix, TaskHead
from prefixkit.training import layout

ANSWERS = ("label", "tags")
"""Those of one row an example."""


def backward(
    backbone: Backbone,
    batch: LabelledBatch,
    owner: Tensor,
    prefixes: Sequence[KeyValuePrefix],
    heads: Sequence[TaskHead],
    shares: Tensor,
) -> Tensor:
    """Add the gradients of `batch` to prefixes and heads; gives each run's summed loss, in nats.

    Args:
        owner: [batch], whose each example is.
        heads: all of one size, which read the same states.
        shares: [runs], what the loss of a label counts.
    """
    inputs = {name: tensor.to(backbone.device) for name, tensor in batch.inputs.items()}
    states = layout.states_of_several(backbone, inputs, prefixes, owner)
    scores = batch.scores(read_each(heads, owner, states, inputs["attention_mask"]))
    labels = batch.labels.to(backbone.device).view(len(owner), -1)
    each = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    whose = owner[:, None].expand(labels.shape).flatten()
    (each * shares.to(each)[whose]).sum().backward()  # type: ignore[no-untyped-call]
    return torch.zeros(len(shares), dtype=torch.float64).index_add(0, whose.cpu(), each.detach().double().cpu())
