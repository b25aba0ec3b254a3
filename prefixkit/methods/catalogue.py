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
    """The kinds: `decoder`, `encoder`, `encoder-decoder`, `vision`."""
    trains: str
    init: tuple[str, ...]
    """The starts that `--init` takes, the default first; none where nothing is trained."""
    paper: str
    head: bool = True
    """Whether a task's head can be trained with it."""
    slots: str = "none"
    """Whether it stands in the slots of a template: `none`, `taken` where there are some, or `needed`."""
    command: str = "train"


METHODS = {
    entry.name: entry
    for entry in (
        MethodEntry(
            name="prefix-tuning",
            injection="key_value_prefix",
            backbones=("decoder", "encoder-decoder"),
            trains="keys and values in every layer, before the text or in slots of it, directly or through an MLP",
            init=("text", "text:WORDS", "random", "zeros", "prefix:FILE"),
            paper="Li & Liang 2021, arXiv 2101.00190",
            slots="taken",
        ),
        MethodEntry(
            name="prompt-tuning",
            injection="embedding_prompt",
            backbones=("decoder", "encoder", "encoder-decoder"),
            trains="input vectors before the text",
            init=("text", "text:WORDS", "vocabulary", "uniform", "uniform:code", "labels", "npy:FILE", "prefix:FILE"),
            paper="Lester et al. 2021, arXiv 2104.08691",
            slots="taken",
        ),
        MethodEntry(
            name="p-tuning-v2",
            injection="key_value_prefix",
            backbones=("encoder", "decoder"),
            trains="keys and values in every layer, beside a head for the task",
            init=("random", "normal", "text", "text:WORDS", "prefix:FILE"),
            paper="Liu et al. 2022, arXiv 2110.07602",
        ),
        MethodEntry(
            name="visual-prompt-tuning",
            injection="hidden_prompt",
            backbones=("vision",),
            trains="vectors among an image's tokens, in every layer or before the first",
            init=("uniform",),
            paper="Jia et al. 2022, arXiv 2203.12119",
        ),
        MethodEntry(
            name="bitfit",
            injection="parameter_delta",
            backbones=("decoder", "encoder", "vision"),
            trains="the backbone's biases, or its normalisations, as deltas",
            init=("zeros", "prefix:FILE"),
            paper="Ben Zaken et al. 2022, arXiv 2106.10199",
        ),
        MethodEntry(
            name="linear-probe",
            injection="task_head",
            backbones=("decoder", "encoder", "vision"),
            trains="a head for the task alone: the baseline",
            init=("random",),
            paper="Alain & Bengio 2016, arXiv 1610.01644",
        ),
        MethodEntry(
            name="p-tuning",
            injection="embedding_prompt",
            backbones=("decoder", "encoder"),
            trains="input vectors before the text or in slots of it, through an LSTM or an MLP",
            init=("random", "text", "text:WORDS"),
            paper="Liu et al. 2021, arXiv 2103.10385",
            slots="taken",
        ),
        MethodEntry(
            name="optiprompt",
            injection="embedding_prompt",
            backbones=("decoder", "encoder"),
            trains="vectors in the slots of a cloze template",
            init=("random", "manual:WORDS"),
            paper="Zhong et al. 2021, arXiv 2104.05240",
            slots="needed",
        ),
        MethodEntry(
            name="soft-prompts",
            injection="hidden_prompt",
            backbones=("encoder",),
            trains="what is added to the words of a pattern in every layer; several make a mixture ([[patterns]])",
            init=("text", "text:WORDS"),
            paper="Qin & Eisner 2021, arXiv 2104.06599",
            slots="needed",
            head=False,
        ),
        MethodEntry(
            name="autoprompt",
            injection="embedding_prompt",
            backbones=("decoder", "encoder"),
            trains="which tokens stand before the text or in slots of it",
            init=("text", "text:WORDS", "random", "mask"),
            paper="Shin et al. 2020, arXiv 2010.15980",
            slots="taken",
            head=False,
        ),
        MethodEntry(
            name="cartridge",
            injection="key_value_prefix",
            backbones=("decoder",),
            trains="keys and values in every layer, to stand for a document (--set method.document=FILE)",
            init=("document", "random", "prefix:FILE"),
            paper="Eyuboglu et al. 2025, arXiv 2506.06266",
            head=False,
        ),
        MethodEntry(
            name="capture",
            injection="key_value_prefix",
            backbones=("decoder",),
            trains="nothing: the keys and values of a context, exactly, by `prefixkit capture`",
            init=(),
            paper="Brown et al. 2020, arXiv 2005.14165, for learning in context",
            command="capture",
        ),
    )
}

TRAINED = tuple(entry.name for entry in METHODS.values() if entry.command == "train")


def method_file(name: str) -> MethodFile:
    """The module of the method called `name`, one of `TRAINED`."""
    return cast("MethodFile", import_module(f"prefixkit.methods.{name.replace('-', '_')}"))
