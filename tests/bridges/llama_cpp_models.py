"""The real llama.cpp, as tests/install_llama_cpp put it into $LLAMA_CPP_FOLDER, and tiny models for it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.architectures import VOCAB, tiny
from tests.small_tokenizer import write_folder

# Releases of Gemma 3 have five sliding layers, then a full one; those of Qwen 3 normalise the experts' weights.
CHANGED: Mapping[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "gemma3_narrow": {"layer_types": ["sliding_attention"] * 2},
    "qwen3_moe": {"norm_topk_prob": True},
}
TYPES = {"float32": 0, "float16": 1}
# What releases say and transformers 5 does not write, for the converter.
STATED: Mapping[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 128},
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "falcon": {"num_kv_heads": 1},
}


def model_of(family: str) -> PreTrainedModel:
    """The tiny model that both compute; `gemma3_narrow` has no layer that reads everything."""
    return tiny(family.removesuffix("_narrow"), **CHANGED.get(family, {}))


def installed() -> Any:
    """The module `llama_cpp`; its folder and its converter's come behind the tests' own packages."""
    folder = os.environ.get("LLAMA_CPP_FOLDER")
    if folder is None:
        pytest.fail("needs llama.cpp: run tests/install_llama_cpp FOLDER, then set LLAMA_CPP_FOLDER", pytrace=False)
    (source,) = Path(folder).glob("llama_cpp_python-*/")
    converter = source / "vendor" / "llama.cpp"
    for place in (source, converter, converter / "gguf-py", Path(folder) / "packages"):
        if str(place) not in sys.path:
            sys.path.append(str(place))
    os.environ["LLAMA_CPP_LIB_PATH"] = str(Path(folder) / "build" / "bin")
    import llama_cpp

    return llama_cpp


def write_gguf(family: str, folder: Path) -> Path:
    """The tiny model of `family` in `folder` in both forms; llama.cpp's own converter writes the second, in float32."""
    import gguf
    from conversion import get_model_class
    from conversion.base import ModelBase

    model_of(family).save_pretrained(folder)
    write_folder(folder)
    stated = {**ModelBase.load_hparams(folder, False), **STATED.get(family, {})}
    path = folder / "model.gguf"
    kind = get_model_class(json.loads((folder / "config.json").read_text())["architectures"][0])
    model = kind(folder, gguf.LlamaFileType.ALL_F32, path, hparams=stated)

    def no_vocabulary() -> None:
        model._set_vocab_none()
        model.gguf_writer.add_vocab_size(VOCAB)

    model.set_vocab = no_vocabulary
    with torch.inference_mode():
        model.write()
    return path


def opened(path: Path, dtype: str, flash: str, **options: Any) -> Any:
    """A `Llama` of one thread that keeps all logits."""
    return installed().Llama(
        str(path),
        n_ctx=128,
        n_batch=128,
        type_k=TYPES[dtype],
        type_v=TYPES[dtype],
        flash_attn=flash == "on",
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        **options,
    )


def logits(llama: Any, tokens: list[int]) -> Any:
    """[seq, vocab] of the tokens that come next."""
    llama.eval(tokens)
    return np.array(llama.scores[llama.n_tokens - len(tokens) : llama.n_tokens])
