"""Sequence states in llama.cpp itself: see tests/install_llama_cpp."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.geometry import measure
from prefixkit.backbones.identity import identify
from prefixkit.bridges.imported import prefix_of
from prefixkit.bridges.llama_cpp import export_llama_cpp, import_llama_cpp, load_state
from prefixkit.errors import InputError
from prefixkit.injections import KeyValuePrefix
from prefixkit.prefix import Prefix, key_values
from tests.bridges.llama_cpp_models import installed, logits, model_of, opened, write_gguf
from tests.ragged import alone, greedy, prompts, random_prefix

pytestmark = pytest.mark.matrix

LENGTH, STEPS, SCALE = 6, 12, 3
# llama.cpp looks GELU up in a table of float16, and its own float16 and flash attention round as much without a prefix.
EXACT, ROUNDED = 1e-3, 1e-2
KINDS = list(itertools.product(("float32", "float16"), ("off", "on")))
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt2", "gpt_neox", "falcon", "bloom"]
WINDOWED = ["gemma2", "gemma3", "gemma3_narrow"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    installed()

    @cache
    def make(family: str) -> Path:
        return write_gguf(family, tmp_path_factory.mktemp(family))

    yield make
    make.cache_clear()


def strong(model: PreTrainedModel) -> KeyValuePrefix:
    prefix = random_prefix(model, LENGTH)
    keys, values = (tuple(SCALE * rows for rows in side) for side in (prefix.keys, prefix.values))
    return replace(prefix, keys=keys, values=values)


def stored(model: PreTrainedModel, folder: Path) -> Prefix:
    drawn = strong(model)
    pairs = [(key.numpy(), value.numpy()) for key, value in zip(drawn.keys, drawn.values, strict=True)]
    identity = identify(folder, folder.name, None, model.config, measure(model, "tiny"))
    return prefix_of(pairs, identity, runtime="llama-cpp")


def saved(llama: Any, path: Path, filler: list[int]) -> bytes:
    """What llama.cpp itself writes of the sequence."""
    binding = installed()
    tokens = (binding.llama_token * len(filler))(*filler)
    assert binding.llama_state_seq_save_file(llama.ctx, str(path).encode(), 0, tokens, len(filler))
    return path.read_bytes()


@pytest.mark.parametrize(("dtype", "flash"), KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWED])
def test_llama_cpp_computes_what_transformers_computes(
    family: str, dtype: str, flash: str, gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, drawn, row = model_of(family), strong(model_of(family)), prompts()[2]
    with torch.no_grad():
        expected, bare = alone(ours, row, drawn).numpy(), alone(ours, row, None).numpy()
    llama = opened(gguf(family), dtype, flash)
    assert np.abs(logits(llama, row.tolist()) - bare).max() <= (ROUNDED if (dtype, flash) != KINDS[0] else 2 * EXACT)
    state = tmp_path / "prefix.state"
    export_llama_cpp(stored(ours, gguf(family).parent), state, dtype=dtype, flash=flash)
    filler = load_state(llama, state)
    assert saved(llama, tmp_path / "again.state", filler) == state.read_bytes()
    found = logits(llama, row.tolist())
    assert np.abs(found - expected).max() <= (EXACT if (dtype, flash) == KINDS[0] else ROUNDED)
    assert np.abs(expected - bare).max() > 1
    filler = load_state(llama, state)
    tokens = itertools.islice(llama.generate(filler + row.tolist(), temp=0, top_k=1), STEPS)
    assert list(tokens) == greedy(ours, row, drawn, STEPS)[0].tolist()


def test_a_small_cache_for_windows(gguf: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp may keep no more than the window of sliding layers; the prefix leaves it as the text grows."""
    ours, drawn, row = model_of("gemma3"), strong(model_of("gemma3")), prompts()[1]
    export_llama_cpp(stored(ours, gguf("gemma3").parent), tmp_path / "state", dtype="float32")
    llama = opened(gguf("gemma3"), "float32", "off", swa_full=False)
    load_state(llama, tmp_path / "state")
    with torch.no_grad():
        expected = alone(ours, row, drawn).numpy()
    assert np.abs(logits(llama, row.tolist()) - expected).max() <= 2 * EXACT


def test_one_state_for_one_prompt_after_another(gguf: Callable[[str], Path], tmp_path: Path) -> None:
    """What was loaded stays while prompts begin with its filler tokens."""
    ours, drawn = model_of("llama"), strong(model_of("llama"))
    export_llama_cpp(stored(ours, gguf("llama").parent), tmp_path / "state", dtype="float32")
    llama = opened(gguf("llama"), "float32", "off")
    filler = load_state(llama, tmp_path / "state")
    for row in (*prompts(), prompts()[0]):
        tokens = itertools.islice(llama.generate(filler + row.tolist(), temp=0, top_k=1), STEPS)
        assert list(tokens) == greedy(ours, row, drawn, STEPS)[0].tolist()


@pytest.mark.parametrize("flash", ["off", "on"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_states_that_llama_cpp_saves(family: str, flash: str, gguf: Callable[[str], Path], tmp_path: Path) -> None:
    row, ours, held = prompts()[0], model_of(family), DynamicCache()
    with torch.no_grad():
        ours(input_ids=row[None], past_key_values=held)
    llama = opened(gguf(family), "float32", flash)
    logits(llama, row.tolist())
    saved(llama, tmp_path / "state", row.tolist())
    back = import_llama_cpp(tmp_path / "state", backbone=str(gguf(family).parent))
    for (key, value), layer in zip(key_values(back), held.layers, strict=True):
        assert np.abs(key - layer.keys[0].numpy()).max() <= ROUNDED
        assert np.abs(value - layer.values[0].numpy()).max() <= ROUNDED
        assert np.abs(key).max() > 0.5


def test_contexts_of_another_kind_are_refused(gguf: Callable[[str], Path], tmp_path: Path) -> None:
    prefix, state = stored(model_of("llama"), gguf("llama").parent), tmp_path / "state"
    export_llama_cpp(prefix, state)
    for dtype, flash in (("float32", "off"), ("float16", "on")):
        with pytest.raises(InputError, match=r"found one that llama\.cpp does not load"):
            load_state(opened(gguf("llama"), dtype, flash), state)
    with pytest.raises(InputError, match=r"found one that llama\.cpp does not load"):
        load_state(opened(gguf("gpt2"), "float16", "off"), state)
    assert len(load_state(opened(gguf("llama"), "float16", "off"), state)) == LENGTH


def test_rows_that_llama_cpp_drops_are_missed(gguf: Callable[[str], Path], tmp_path: Path) -> None:
    """It loads cells at negative positions without a word, and without the cells."""
    state = tmp_path / "state"
    export_llama_cpp(stored(model_of("llama"), gguf("llama").parent), state)
    data = bytearray(state.read_bytes())
    cells = 4 * (3 + LENGTH + 2)
    for index in range(LENGTH):
        data[cells + 12 * index : cells + 12 * index + 4] = (index - LENGTH).to_bytes(4, "little", signed=True)
    state.write_bytes(data)
    with pytest.raises(InputError, match=r"expected rows at positions 0 to 5 in llama\.cpp; found -6 to -1"):
        load_state(opened(gguf("llama"), "float16", "off"), state)
