"""A model folder of onnxruntime-genai, with prefixes as its adapters.

genai cannot be given a past: it begins every text with an empty one. So the prefix is an input of the graph
(`prefixkit.bridges.prefixed_graph`), which an adapter fills, and genai counts, pads and rewinds tokens of the text
alone. Measured with onnxruntime-genai 0.18.0; it depends on the CPU build of onnxruntime, which would overwrite the GPU
build, so that it belongs into an environment of its own. The same folder serves onnxruntime without genai.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnx_ir as ir

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.genai_adapters import SUFFIX, others
from prefixkit.bridges.genai_config import genai_config, special_tokens
from prefixkit.bridges.genai_readme import readme
from prefixkit.bridges.onnx_adapter import check_dtype, fitted, model_version, write_adapter
from prefixkit.bridges.portable import GRAPH, Portable, refuse_untakeable, runtime_folder, write_portable
from prefixkit.bridges.prefixed_graph import prefixed
from prefixkit.bridges.trial import as_past, logits, refuse_difference, session
from prefixkit.prefix import Prefix, key_values
from prefixkit.task import load_tokenizer

CONFIG = "genai_config.json"
ADAPTERS = "adapters"
TITLE = "onnxruntime-genai"


def export_genai(prefix: Prefix, output: str | Path, *, backbone: str, dtype: str = "float32") -> Carried:
    """Write `backbone` and `prefix` as the folder `output`, if and only if the graph computes what PyTorch computes.

    The folder has `model.onnx` with its weights, tokenizer, `genai_config.json`, `adapters/NAME.onnx_adapter` and a
    README.md with the code that runs it. `prefixkit export --onnx-adapter` makes further adapters for it, which stay
    where this function replaces a folder that it wrote.

    Args:
        backbone: folder or hub id.
        dtype: of weights and cache, float32 or float16.

    Raises:
        ConfigError: another dtype.
        FormatError: something besides keys and values, or a prompt, right before the text of a decoder; numbers that
            `dtype` cannot hold.
        ParityError: the graph computes something else than PyTorch; nothing is written.
        InputError: another backbone, or a folder that cannot be written, holds other files or adapters for others.
    """
    output, name = Path(output), _name(prefix)
    check_dtype(dtype)
    refuse_untakeable(prefix, TITLE)
    if prefix.manifest.injections[0].kind == "key_value_prefix":
        fitted(prefix, dtype)
    with runtime_folder(output, TITLE) as folder:
        kept = others(output / ADAPTERS, name, model_version(prefix.manifest.backbone), dtype)
        made = write_portable(prefix, backbone, folder, dtype=dtype, runtime=TITLE)
        _rewrite(folder / GRAPH, made.prefix)
        check_adapter(folder / GRAPH, made.prefix, dtype)
        (folder / ADAPTERS).mkdir()
        lost = write_adapter(made.prefix, folder / ADAPTERS / f"{name}{SUFFIX}", dtype)
        for adapter in kept:
            shutil.copy2(adapter, folder / ADAPTERS)
        _describe(made, folder, name, dtype)
    stay = f"; kept beside {name}: {', '.join(adapter.stem for adapter in kept)}" if kept else ""
    return Carried(output=output, next=f"the code in {output / 'README.md'}, run in that folder{stay}", lost=lost)


def _describe(made: Portable, folder: Path, name: str, dtype: str) -> None:
    """Write what genai reads of the folder, and what its users do."""
    tokens = special_tokens(made.prefix, folder)
    config = genai_config(made, tokens)
    (folder / CONFIG).write_text(f"{json.dumps(config, indent=2, sort_keys=True)}\n", encoding="utf-8")
    text = readme(made.prefix, name, tokens, dtype, load_tokenizer(folder))
    (folder / "README.md").write_text(text, encoding="utf-8")


def check_adapter(graph: Path, prefix: Prefix, dtype: str) -> None:
    """Raise ParityError where a prefix as inputs does not do what it does as the past, which PyTorch confirmed."""
    past, loaded = as_past(key_values(prefix), dtype), session(graph)
    empty = {name: array[:, :, :0] for name, array in past.items()}
    given, _ = fitted(prefix, dtype)
    length = prefix.manifest.injections[0].length or 0
    refuse_difference(graph.name, logits(loaded, {**empty, **given}, 0), logits(loaded, past, length), "an adapter")


def _rewrite(path: Path, prefix: Prefix) -> None:
    """Give the graph at `path` its prefix inputs; the weights beside it stay as they are."""
    backbone = prefix.manifest.backbone
    model = ir.load(path)
    prefixed(model)
    model.metadata_props["prefixkit.model_version"] = str(model_version(backbone))
    model.metadata_props["prefixkit.weights_hash"] = str(backbone.weights_hash)
    ir.save(model, path)


def _name(prefix: Prefix) -> str:
    """The name of the adapter's file: that of the task, where it can be one."""
    name = prefix.manifest.task.name if prefix.manifest.task is not None else ""
    return name if re.fullmatch(r"\w[\w-]{0,63}", name, re.ASCII) else "prefix"
