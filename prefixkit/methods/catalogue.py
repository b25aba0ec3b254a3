"""Every method by name: what it trains, on which backbones, and where it was published. Light enough for `methods`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from prefixkit.methods.method import MethodFile


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One row of `prefixkit methods`. The method is in the file of its name."""

    name: str
    injection: str
    backbones: tuple[str, ...]
    """The kinds: `decoder`, `encoder-decoder`."""
    trains: str
    init: tuple[str, ...]
    """The starts that `--init` takes, the default first."""
    paper: str


METHODS = {
    entry.name: entry
    for entry in (
        MethodEntry(
            name="prefix-tuning",
            injection="key_value_prefix",
            backbones=("decoder", "encoder-decoder"),
            trains="keys and values in every layer, directly or through an MLP",
            init=("text", "text:WORDS", "random", "zeros", "prefix:FILE"),
            paper="Li & Liang 2021, arXiv 2101.00190",
        ),
        MethodEntry(
            name="prompt-tuning",
            injection="embedding_prompt",
            backbones=("decoder",),
            trains="input vectors before the text",
            init=("text", "text:WORDS", "vocabulary", "uniform", "uniform:code", "labels", "npy:FILE", "prefix:FILE"),
            paper="Lester et al. 2021, arXiv 2104.08691",
        ),
        MethodEntry(
            name="p-tuning",
            injection="embedding_prompt",
            backbones=("decoder",),
            trains="input vectors before the text, through an LSTM or an MLP",
            init=("random", "text", "text:WORDS"),
            paper="Liu et al. 2021, arXiv 2103.10385",
        ),
    )
}


def method_file(name: str) -> MethodFile:
    """The module of the method called `name`, a key of `METHODS`."""
    return cast("MethodFile", import_module(f"prefixkit.methods.{METHODS[name].name.replace('-', '_')}"))
