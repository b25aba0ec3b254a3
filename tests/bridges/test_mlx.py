"""Prompt caches of mlx-lm there and back, with mlx itself as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.utils import load as load_mlx
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from prefixkit.backbones.geometry import measure
from prefixkit.backbones.identity import identify
from prefixkit.bridges.imported import prefix_of
from prefixkit.bridges.mlx import export_mlx, import_mlx
from prefixkit.cli import run
from prefixkit.errors import BackboneError, ConfigError, FormatError, InputError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.prefix import Prefix, key_values, load, save
from tests.architectures import WINDOW, tiny
from tests.prefixes import small_prefix
from tests.ragged import alone, greedy, prompts, random_prefix
from tests.small_tokenizer import END, write_folder

mx.set_default_device(mx.cpu)

LENGTH = 6
SCALE = 2
STEPS = 12
# Of GPT-NeoX, whose GELU mlx-lm approximates; of the others.
TOLERANCES = {"gpt_neox": 1e-3}
TOLERANCE = 1e-5
# What releases say and transformers 5 does not write: mlx-lm 0.32 assumes its own defaults instead, or refuses.
STATED: Mapping[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 128},
    "qwen2": {"rope_theta": 10_000.0},
    "qwen3_moe": {"rope_theta": 10_000.0, "num_experts": 4},
    "gpt_neox": {"rotary_emb_base": 10_000, "rotary_pct": 0.5},
    "gemma3": {"sliding_window_pattern": 2},
}
# mlx-lm makes GPT-NeoX's MLP four times as wide as the model, whatever its configuration says.
CHANGED: Mapping[str, dict[str, Any]] = {"gpt_neox": {"intermediate_size": 256}}
FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma3", "phi3", "gpt2", "gpt_neox"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model in the form of the family's releases, which mlx-lm reads."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny(family, **CHANGED.get(family, {})).save_pretrained(folder)
        write_folder(folder, tokenizer_config={"bos_token": END, "eos_token": END})
        config = folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **STATED.get(family, {})}))
        if family == "gpt2":
            weights = {name.removeprefix("transformer."): array for name, array in tensors_of(folder).items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def tensors_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


def model_of(family: str) -> PreTrainedModel:
    return tiny(family, **CHANGED.get(family, {}))


def strong(model: PreTrainedModel) -> KeyValuePrefix:
    prefix = random_prefix(model, LENGTH)
    keys, values = (tuple(SCALE * rows for rows in side) for side in (prefix.keys, prefix.values))
    return replace(prefix, keys=keys, values=values)


def stored(model: PreTrainedModel, folder: Path, dtype: Any = np.float32) -> Prefix:
    """A strong prefix for `model`, bound to its folder."""
    drawn = strong(model)
    pairs = [(k.numpy().astype(dtype), v.numpy().astype(dtype)) for k, v in zip(drawn.keys, drawn.values, strict=True)]
    identity = identify(folder, folder.name, None, model.config, measure(model, "tiny"))
    return prefix_of(pairs, identity, runtime="mlx")


def logits(model: Any, ids: list[int], cache_: Any = None) -> Any:
    return np.array(model(mx.array(ids)[None], cache=cache_))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_computes_what_transformers_computes(family: str, released: Callable[[str], Path], tmp_path: Path) -> None:
    ours, drawn = model_of(family), strong(model_of(family))
    theirs, _ = load_mlx(str(released(family)))
    export_mlx(stored(ours, released(family)), tmp_path / "cache.safetensors")
    row = prompts()[2]
    with torch.no_grad():
        expected, bare = alone(ours, row, drawn).numpy(), alone(ours, row, None).numpy()
    found = logits(theirs, row.tolist(), load_prompt_cache(str(tmp_path / "cache.safetensors")))
    assert np.abs(found - expected).max() <= TOLERANCES.get(family, TOLERANCE)
    assert np.abs(expected - bare).max() > 1
    assert np.abs(logits(theirs, row.tolist()) - found).max() > 1
    classes = [type(layer).__name__ for layer in load_prompt_cache(str(tmp_path / "cache.safetensors"))]
    assert classes == [type(layer).__name__ for layer in make_prompt_cache(theirs)]
    tokens = generate_step(
        mx.array(row.tolist()),
        theirs,
        max_tokens=STEPS,
        prompt_cache=load_prompt_cache(str(tmp_path / "cache.safetensors")),
    )
    assert [int(token) for token, _ in tokens] == greedy(ours, row, drawn, STEPS)[0].tolist()


@pytest.mark.parametrize("layout", ["current", "older"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_there_and_back(family: str, dtype: str, layout: str, released: Callable[[str], Path], tmp_path: Path) -> None:
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    prefix = stored(model_of(family), released(family), kind)
    export_mlx(prefix, tmp_path / "cache.safetensors", layout=layout)
    back = import_mlx(tmp_path / "cache.safetensors", backbone=str(released(family)))
    assert save(back, tmp_path / "back").manifest.content == save(prefix, tmp_path / "prefix").manifest.content


def test_caches_that_mlx_saves(released: Callable[[str], Path], tmp_path: Path) -> None:
    """mlx-lm keeps spare rows and says how many are real."""
    model, _ = load_mlx(str(released("gemma3")))
    made, path = make_prompt_cache(model), tmp_path / "cache.safetensors"
    model(mx.array([[5, 6, 7, 8]]), cache=made)
    model(mx.array([[9]]), cache=made)
    save_prompt_cache(str(path), made, {"model": str(released("gemma3"))})
    back = import_mlx(path)
    assert back.manifest.injections[0].length == 5
    assert back.manifest.backbone.weights_hash is None
    for (key, value), layer in zip(key_values(back), made, strict=True):
        assert np.array_equal(key, np.array(layer.keys_and_values()[0])[0])
        assert np.array_equal(value, np.array(layer.keys_and_values()[1])[0])


def test_the_older_layout(released: Callable[[str], Path], tmp_path: Path) -> None:
    """Read as mlx-lm 0.28 reads: the numbers of each layer, then what the user states, then the classes."""
    path, prefix = tmp_path / "cache.safetensors", stored(model_of("gemma3"), released("gemma3"))
    export_mlx(prefix, path, layout="older")
    from mlx.utils import tree_unflatten

    arrays, metadata = mx.load(str(path), return_metadata=True)
    numbers, user, classes = tree_unflatten(list(metadata.items()))
    assert (numbers, classes) == ([["0", str(WINDOW), "6", "6"], ""], ["RotatingKVCache", "KVCache"])
    assert user == {"model": released("gemma3").name, "tokenizer_config": "{}"}
    for (key, value), (theirs, other) in zip(key_values(prefix), tree_unflatten(list(arrays.items())), strict=True):
        assert np.array_equal(np.array(theirs)[0], key)
        assert np.array_equal(np.array(other)[0], value)


@pytest.mark.parametrize("family", ["gemma2", "mistral_window"])
def test_windows_that_mlx_leaves_out_are_told(family: str, released: Callable[[str], Path], tmp_path: Path) -> None:
    """Up to the window it computes the same, and beyond it something else."""
    ours, drawn = model_of(family), strong(model_of(family))
    theirs, _ = load_mlx(str(released(family)))
    carried = export_mlx(stored(ours, released(family)), tmp_path / "cache.safetensors")
    assert carried.lost[0].endswith(f"right up to {WINDOW} tokens in all")
    apart = []
    for row in prompts()[:2]:
        with torch.no_grad():
            expected = alone(ours, row, drawn).numpy()
        found = logits(theirs, row.tolist(), load_prompt_cache(str(carried.output)))
        apart.append(np.abs(found - expected).max())
    assert apart[0] <= TOLERANCE
    assert apart[1] > 0.1


def test_windows_of_a_family_that_was_not_tried_are_refused(released: Callable[[str], Path], tmp_path: Path) -> None:
    prefix = stored(model_of("gemma3"), released("gemma3"))
    other = replace(prefix.manifest, backbone=replace(prefix.manifest.backbone, family="olmo3"))
    with pytest.raises(FormatError, match="found those of olmo3, which were not tried"):
        export_mlx(Prefix(other, prefix.tensors), tmp_path / "cache.safetensors")
    assert not (tmp_path / "cache.safetensors").exists()


def test_a_family_that_was_not_tried_is_told(backbone_folder: Callable[..., Path], tmp_path: Path) -> None:
    carried = export_mlx(stored(tiny("bloom"), backbone_folder("bloom")), tmp_path / "cache.safetensors")
    assert carried.lost == ("mlx-lm was not tried with bloom: compare its logits before you rely on it",)
    assert export_mlx(stored(tiny("llama"), backbone_folder("llama")), tmp_path / "cache.safetensors").lost == ()


def test_files_that_are_refused(released: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    rows = mx.zeros((1, 2, 5, 16))

    def refusal(*layers: Any) -> str:
        save_prompt_cache(str(path), list(layers), {"model": "nobody/nothing"})
        with pytest.raises((FormatError, MismatchError, BackboneError)) as caught:
            import_mlx(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def filled(made: Any, count: int = 5) -> Any:
        made.update_and_fetch(rows[:, :, :count], rows[:, :, :count])
        return made

    assert "the backbone; found a file that names nobody/nothing, which is not here; give it with --b" in refusal(
        filled(KVCache())
    )
    wide = KVCache()
    wide.update_and_fetch(mx.zeros((1, 2, 5, 64)), mx.zeros((1, 2, 5, 64)))
    assert "expected KVCache or RotatingKVCache in layer 0; found QuantizedKVCache" in refusal(wide.to_quantized())
    full = RotatingKVCache(max_size=4)
    filled(full)
    told = "expected every row in layer 0; found a window that rotated over 5 tokens; make the cache of a shorter"
    assert told in refusal(full)
    several = KVCache()
    several.update_and_fetch(mx.zeros((2, 2, 5, 16)), mx.zeros((2, 2, 5, 16)))
    assert "expected tensor 0.0 of [1, kv_heads, length, head_dim]" in refusal(several)
    save_prompt_cache(str(path), [filled(KVCache())], {})
    arrays, metadata = mx.load(str(path), return_metadata=True)
    for more in ("0.3", "1.0", "other"):
        mx.save_safetensors(str(path), {**arrays, more: mx.zeros(2)}, metadata)
        with pytest.raises(FormatError, match=f"the tensors of 1 layers and nothing else; found {more}; save_prompt"):
            import_mlx(path)
    mx.save_safetensors(str(path), {**arrays, "0.2": mx.array(999, mx.int32)}, metadata)
    with pytest.raises(FormatError, match=r"every row in layer 0; found \d+ for 999 tokens; save_prompt_cache"):
        import_mlx(path)
    save_file({"0.0": np.zeros(2, np.float32)}, path, {"format": "pt"})
    with pytest.raises(FormatError, match="expected a prompt cache of mlx-lm; found other safetensors"):
        import_mlx(path)


def test_another_backbone_is_refused(released: Callable[[str], Path], tmp_path: Path) -> None:
    rows, uneven = mx.zeros((1, 2, 5, 16)), [KVCache(), KVCache()]
    uneven[0].update_and_fetch(rows, rows)
    uneven[1].update_and_fetch(rows[:, :, :4], rows[:, :, :4])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), uneven, {"model": str(released("llama"))})
    with pytest.raises(MismatchError, match="as many tokens in every layer; found 4 and 5"):
        import_mlx(tmp_path / "cache.safetensors")
    export_mlx(stored(model_of("llama"), released("llama")), tmp_path / "cache.safetensors")
    with pytest.raises(MismatchError, match=r"2 layers of .* \(4, 16, 16\); found 2 of \(2, 16, 16\)"):
        import_mlx(tmp_path / "cache.safetensors", backbone=str(released("gpt2")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_another_type(dtype: str, released: Callable[[str], Path], tmp_path: Path) -> None:
    """Keys and values of the model's type keep it at its speed; the numbers are as near as those of the type."""
    ours, drawn, row = model_of("llama"), strong(model_of("llama")), prompts()[2]
    theirs, _ = load_mlx(str(released("llama")))
    theirs.set_dtype(getattr(mx, dtype))
    carried = export_mlx(stored(ours, released("llama")), tmp_path / "cache.safetensors", dtype=dtype)
    assert carried.lost[0].startswith(f"{dtype} rounds the prefix, by ")
    found = theirs(mx.array(row.tolist())[None], cache=load_prompt_cache(str(carried.output)))[0]
    assert found.dtype == getattr(mx, dtype)
    with torch.no_grad():
        expected, bare = alone(ours, row, drawn).numpy(), alone(ours, row, None).numpy()
    assert np.abs(np.array(found.astype(mx.float32)) - expected).max() <= 0.05
    assert np.abs(expected - bare).max() > 1


def test_numbers_that_float16_does_not_reach_are_refused(released: Callable[[str], Path], tmp_path: Path) -> None:
    prefix = stored(model_of("llama"), released("llama"))
    wide = Prefix(prefix.manifest, {name: 1e5 * array for name, array in prefix.tensors.items()})
    with pytest.raises(FormatError, match=r"numbers up to 65504 for float16; found .*; use --set dtype=bfloat16"):
        export_mlx(wide, tmp_path / "cache.safetensors", dtype="float16")
    assert not (tmp_path / "cache.safetensors").exists()


def test_names_that_mlx_does_not_read_are_refused(released: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.safetensors; found '\.cache'; .*: use my\.cache\.safetensors"):
        export_mlx(stored(model_of("llama"), released("llama")), tmp_path / "my.cache")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    for settings, told in (
        ({"dtype": "float64"}, "expected dtype=stored or float32 or float16 or bfloat16; found 'float64'"),
        ({"layout": "new"}, "expected layout=current or older; found 'new'"),
    ):
        with pytest.raises(ConfigError, match=f"export --mlx: {told}"):
            export_mlx(small_prefix(), tmp_path / "cache.safetensors", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_an_older_layout_has_no_numbers(released: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    export_mlx(stored(model_of("llama"), released("llama")), str(path), layout="older")
    assert import_mlx(str(path), backbone=released("llama")).manifest.injections[0].length == LENGTH
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(path), {**arrays, "0.2": mx.array(LENGTH, mx.int32)}, metadata)
    with pytest.raises(FormatError, match=r"the tensors of 2 layers and nothing else; found 0\.2"):
        import_mlx(path)


def test_numbers_and_lengths_that_no_prefix_has(released: Callable[[str], Path], tmp_path: Path) -> None:
    path, prefix = tmp_path / "cache.safetensors", stored(model_of("llama"), released("llama"))
    name, array = next(iter(prefix.tensors.items()))
    export_mlx(Prefix(prefix.manifest, {**prefix.tensors, name: array * np.float32("nan")}), path)
    with pytest.raises(FormatError, match=rf"^{path}: expected finite numbers for {name}; found NaN or Infinity; its"):
        import_mlx(path, backbone=str(released("llama")))
    whole = {name: np.resize(array, (2, 128, 16)) for name, array in prefix.tensors.items()}
    (record,) = prefix.manifest.injections
    record = replace(record, length=128, positions=Positions(text_start=128))
    export_mlx(Prefix(replace(prefix.manifest, injections=(record,)), whole), path)
    with pytest.raises(MismatchError, match=rf"^{path}: expected fewer than the 128 positions of .*; found 128; give"):
        import_mlx(path, backbone=str(released("llama")))


def test_commands(released: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, cached, back = (str(tmp_path / name) for name in ("p", "cache.safetensors", "back"))
    save(stored(model_of("llama"), released("llama")), prefix)
    assert run(["export", "--mlx", prefix, "-o", cached, "--set", "layout=older"]) == 0
    assert f'prompt_cache=load_prompt_cache("{cached}")' in capsys.readouterr().out
    assert run(["import", "--mlx", cached, "--backbone", str(released("llama")), "-o", back]) == 0
    assert load(back).manifest.content == load(prefix).manifest.content
    assert run(["export", "--mlx", prefix, "-o", cached, "--set", "layout=new"]) == 2
    assert "layout=current or older" in capsys.readouterr().err
