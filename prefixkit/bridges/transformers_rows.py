"""The prefixes of a batch as keys and values, judged for a `transformers` model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from prefixkit.backbones.attach import check_fits, check_origin
from prefixkit.backbones.attention import ATTACHMENT
from prefixkit.backbones.folding import fold
from prefixkit.backbones.pair import refuse_shapes
from prefixkit.backbones.weights import is_pair
from prefixkit.errors import BackboneError, ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.injections import Injection, KeyValuePrefix, KeyValuePrefixes, injection
from prefixkit.prefix import Prefix

Prefixes = Prefix | Sequence[Prefix | None]
"""One prefix for all rows of a batch, or one for each row; None for a row that has none."""


@torch.no_grad()
def rows_of(
    prefixes: Prefixes, model: PreTrainedModel, batch: int, allow_mismatch: bool
) -> list[KeyValuePrefix | None]:
    """The keys and values of each row, judged.

    Raises:
        BackboneError: the model cannot have one of them in its cache, or has a prefix attached already.
        MismatchError: other layers or shapes than the model's, or another backbone.
    """
    if ATTACHMENT in model.__dict__:
        step = "call detach(model) first"
        raise BackboneError(model.config.model_type, found="a prefix that is attached already", next_step=step)
    asked = [prefixes] if isinstance(prefixes, Prefix) else list(prefixes)
    judged = {id(one): _judged(one, model, allow_mismatch) for one in asked if one is not None}
    if not judged:
        raise ConfigError("prefixes", expected="at least one", found="none")
    rows = [None if one is None else judged[id(one)] for one in asked]
    if is_pair(model.config) and len({None if row is None else row.length for row in rows}) > 1:
        # Positions there count the slots of the cache.
        expected, found = "prefixes of one length", "several lengths"
        raise BackboneError(model.config.model_type, expected=expected, found=found, next_step="make a batch of each")
    return rows * batch if isinstance(prefixes, Prefix) else rows


def _judged(prefix: Prefix, model: PreTrainedModel, allow_mismatch: bool) -> KeyValuePrefix:
    if not allow_mismatch:
        check_origin(prefix, model)
    injected = injection(prefix)
    if is_pair(model.config):
        return _of_the_decoder(injected, model)
    placed = fold(model, injected)
    check_fits(model, placed)
    return placed


def _of_the_decoder(injected: Injection, model: PreTrainedModel) -> KeyValuePrefix:
    parts = injected.parts if isinstance(injected, KeyValuePrefixes) else ()
    wanted = [("decoder.self", Positions(text_start=injected.length))]
    if [(part.place, part.positions) for part in parts] != wanted:
        told = [f"{part.place} with text that starts at {part.positions.text_start}" for part in parts]
        raise BackboneError(
            model.config.model_type,
            expected="a prefix of the decoder alone, behind which text counts on: where its cache puts it",
            found=" and ".join(told) or f"a {type(injected).__name__}",
            next_step="use prefixkit.attach",
        )
    refuse_shapes(parts, model)
    return parts[0]
