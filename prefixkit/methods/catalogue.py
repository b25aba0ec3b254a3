"""Every method by name: what it trains, on which backbones, and where it was published. Light enough for `methods`."""

from __future__ import annotations

from dataclasses import dataclass

REPARAMETERIZATIONS = ("none", "mlp")


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One row of `prefixkit methods`."""

    name: str
    injection: str
    backbones: str
    trains: str
    paper: str


METHODS = {
    entry.name: entry
    for entry in (
        MethodEntry(
            name="prefix-tuning",
            injection="key_value_prefix",
            backbones="decoder",
            trains="keys and values in every layer, directly or through an MLP",
            paper="Li & Liang 2021, arXiv 2101.00190",
        ),
    )
}
