"""Sequence states of llama.cpp, byte for byte; test_llama_cpp_real.py loads them into llama.cpp."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from transformers import PreTrainedModel

from prefixkit.backbones.geometry import measure
from prefixkit.backbones.identity import identify
from prefixkit.bridges.imported import prefix_of
from prefixkit.bridges.llama_cpp import FAMILIES, export_llama_cpp, import_llama_cpp, load_state
from prefixkit.cli import run
from prefixkit.errors import BackboneError, ConfigError, FormatError, InputError, MismatchError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.prefix import Prefix, key_values, load, save
from tests.architectures import CONFIGS, WINDOW, tiny
from tests.prefixes import small_prefix
from tests.ragged import random_prefix

GOLDEN = Path(__file__).parents[1] / "golden"
Folder = Callable[..., Path]


def of_family(family: str, prefix: Prefix | None = None, **facts: Any) -> Prefix:
    """A small prefix (2 layers of 2 heads of 4 dimensions, 3 rows) for a backbone of `family`."""
    prefix = prefix or small_prefix()
    return replace(
        prefix, manifest=replace(prefix.manifest, backbone=replace(prefix.manifest.backbone, family=family, **facts))
    )


def stored(model: PreTrainedModel, folder: Path, dtype: Any = np.float32) -> Prefix:
    """A random prefix for `model`, bound to its folder."""
    drawn = random_prefix(model)
    pairs = [(k.numpy().astype(dtype), v.numpy().astype(dtype)) for k, v in zip(drawn.keys, drawn.values, strict=True)]
    identity = identify(folder, folder.name, None, model.config, measure(model, "tiny"))
    return prefix_of(pairs, identity, runtime="llama-cpp")


@pytest.mark.parametrize(
    ("name", "family", "settings"),
    [
        ("llama-cpp-interleaved.state", "llama", {}),
        ("llama-cpp-flash.state", "gpt2", {"dtype": "float32", "flash": "on"}),
    ],
)
def test_the_bytes_are_those_of_the_golden_file(
    name: str, family: str, settings: dict[str, str], tmp_path: Path
) -> None:
    """Llama.cpp itself wrote files like these, byte for byte, after it had loaded ours."""
    export_llama_cpp(of_family(family), tmp_path / "state", **settings)
    assert (tmp_path / "state").read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("flash", ["off", "on"])
@pytest.mark.parametrize(("dtype", "type_", "size"), [("float32", 0, 4), ("float16", 1, 2)])
def test_every_field(dtype: str, type_: int, size: int, flash: str, tmp_path: Path) -> None:
    """Taken apart with struct alone: a model with a sliding layer, then a full one, has two caches."""
    windows = (
        LayerGeometry(kv_heads=2, key_dim=4, value_dim=4, window=8),
        LayerGeometry(kv_heads=2, key_dim=4, value_dim=4),
    )
    prefix = of_family("gemma2", stacks={"decoder": windows})
    export_llama_cpp(prefix, tmp_path / "state", dtype=dtype, flash=flash)
    data, place = (tmp_path / "state").read_bytes(), 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal place
        place += struct.calcsize(layout)
        return struct.unpack_from(layout, data, place - struct.calcsize(layout))

    assert take("<4sII") == (b"qsgg", 3, 3)
    assert take("<3i") == (0, 0, 0)
    letter = {2: "e", 4: "f"}[size]
    for layer in (1, 0):
        key, value = key_values(prefix)[layer]
        assert take("<II") == (1, 3)
        assert [take("<iIi") for _ in range(3)] == [(0, 1, 0), (1, 1, 0), (2, 1, 0)]
        assert take("<II") == (flash == "off", 1)
        assert take("<iQ") == (type_, 8 * size)
        assert take(f"<24{letter}") == tuple(key.swapaxes(0, 1).reshape(-1))
        if flash == "on":
            assert take("<iQ") == (type_, 8 * size)
            assert take(f"<24{letter}") == tuple(value.swapaxes(0, 1).reshape(-1))
        else:
            assert take("<iII") == (type_, size, 8)
            assert take(f"<24{letter}") == tuple(value.swapaxes(1, 2).reshape(-1))
    assert place == len(data)


def test_halves_of_each_head_take_turns(tmp_path: Path) -> None:
    """RoPE of neighbours: dimensions 0 1 2 3 of transformers are 0 2 1 3 there, in keys alone."""
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    export_llama_cpp(of_family("gpt2"), plain, dtype="float32", flash="on")
    export_llama_cpp(of_family("llama"), turned, dtype="float32", flash="on")
    start, row = struct.calcsize("<6I") + 3 * 12 + struct.calcsize("<II") + 8 + 12, 8 * 4
    first, second = (np.frombuffer(path.read_bytes()[start : start + row], "<f4") for path in (plain, turned))
    assert list(second) == [first[index] for index in (0, 2, 1, 3, 4, 6, 5, 7)]
    assert plain.read_bytes()[-24 * 4 :] == turned.read_bytes()[-24 * 4 :]


@pytest.mark.parametrize("flash", ["off", "on"])
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"opt"}))
def test_there_and_back(family: str, flash: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder(family)
    prefix = stored(tiny(family), folder)
    export_llama_cpp(prefix, str(tmp_path / "state"), dtype="float32", flash=flash)
    back = import_llama_cpp(str(tmp_path / "state"), backbone=folder)
    assert save(back, tmp_path / "back").manifest.content == save(prefix, tmp_path / "prefix").manifest.content


def test_every_family_is_tried() -> None:
    assert {CONFIGS[name]().model_type for name in set(CONFIGS) - {"opt"}} == set(FAMILIES)


def test_a_narrower_type_is_told(backbone_folder: Folder, tmp_path: Path) -> None:
    prefix = stored(tiny("qwen2"), backbone_folder("qwen2"), ml_dtypes.bfloat16)
    tiny_numbers = {name: array * ml_dtypes.bfloat16(1e-6) for name, array in prefix.tensors.items()}
    for tensors, told in ((prefix.tensors, ()), (tiny_numbers, ("float16 rounds the prefix, by 3e-08 at most",))):
        assert export_llama_cpp(Prefix(prefix.manifest, tensors), tmp_path / "state").lost == told
    wide = {name: array * ml_dtypes.bfloat16(1e5) for name, array in prefix.tensors.items()}
    with pytest.raises(FormatError, match=r"numbers up to 65504 for float16; found \d+; use --set dtype=float32"):
        export_llama_cpp(Prefix(prefix.manifest, wide), tmp_path / "wide")
    assert not (tmp_path / "wide").exists()
    assert export_llama_cpp(Prefix(prefix.manifest, wide), tmp_path / "wide", dtype="float32").lost == ()


def test_windows_that_llama_cpp_leaves_out_are_told(backbone_folder: Folder, tmp_path: Path) -> None:
    prefix = stored(tiny("mistral_window"), backbone_folder("mistral_window"))
    told = f"llama.cpp leaves out the sliding windows of mistral: right up to {WINDOW} tokens in all"
    assert export_llama_cpp(prefix, tmp_path / "state", dtype="float32").lost == (told,)


def test_models_that_are_refused(tmp_path: Path) -> None:
    for prefix, told in (
        (
            of_family("opt"),
            "^prefix for tiny: expected .* of bloom, .*; found opt, which was not tried with llama.cpp; see `pre",
        ),
        (of_family("llama", rope={"partial_rotary_factor": 0.5}), "RoPE over whole heads of llama; found over 0.5 of"),
    ):
        with pytest.raises(FormatError, match=told):
            export_llama_cpp(prefix, tmp_path / "state")
        assert not (tmp_path / "state").exists()


@pytest.fixture
def state(backbone_folder: Folder, tmp_path: Path) -> Path:
    """A state for the tiny Llama: 12 bytes and 6 tokens, 8 bytes and 6 cells, 8 bytes, then keys and values."""
    export_llama_cpp(stored(tiny("llama"), backbone_folder("llama")), tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("at", "number", "told"),
    [
        (0, 7, "a sequence state of llama.cpp, version 3; found another file"),
        (4, 4, "version 3; found version 4; llama_state_seq_save_file writes it"),
        (8, 10_000, "expected 40000 more bytes from byte 12 on; found"),
        (36, 2, "expected one stream"),
        (44, 3, "a cell for each position from 0 to 5; found 1 to 5"),
        (44, 2**32 - 1, "found -1 to 5"),
        (48, 2, "a cell for each position"),
        (128, 63, "rows of numbers of 2 bytes; found rows of 63 bytes; llama_state_seq_save_file writes it"),
        (124, 8, r"rows in float32 or float16 \(ggml's type 0 or 1\); found type 8"),
        (128, 2**31, "more bytes from byte"),
    ],
)
def test_damaged_files_are_refused(at: int, number: int, told: str, state: Path, backbone_folder: Folder) -> None:
    data = bytearray(state.read_bytes())
    data[at : at + 4] = number.to_bytes(4, "little")
    state.write_bytes(data)
    with pytest.raises((FormatError, MismatchError), match=told):
        import_llama_cpp(state, backbone=str(backbone_folder("llama")))


def test_files_that_are_refused(state: Path, backbone_folder: Folder, tmp_path: Path) -> None:
    llama = str(backbone_folder("llama"))
    with pytest.raises(BackboneError, match="found a file that names none; give it with --backbone"):
        import_llama_cpp(state)
    with pytest.raises(FormatError, match="found no such file"):
        import_llama_cpp(tmp_path / "none", backbone=llama)
    with pytest.raises(MismatchError, match="expected rows of 64 and 64 numbers, as the backbone's; found 32 and 32"):
        import_llama_cpp(state, backbone=str(backbone_folder("gpt2")))
    with pytest.raises(MismatchError, match=r"expected 1 and 1 layers, as gemma3-0.* has; found 2"):
        import_llama_cpp(state, backbone=str(backbone_folder("gemma3")))
    for end in (-1, 6):
        (tmp_path / "short").write_bytes(state.read_bytes()[:end])
        with pytest.raises(FormatError, match=r"\(truncated\?\)"):
            import_llama_cpp(tmp_path / "short", backbone=llama)


def test_tokens_are_as_many_as_cells(state: Path, backbone_folder: Folder) -> None:
    data = state.read_bytes()
    state.write_bytes(data[:8] + (5).to_bytes(4, "little") + data[16:])
    with pytest.raises(FormatError, match="a cell for each of 5 tokens; found 6 cells; save it with the tokens that"):
        import_llama_cpp(state, backbone=str(backbone_folder("llama")))


def test_numbers_of_another_size_than_their_type_has(state: Path, backbone_folder: Folder) -> None:
    """Values lie transposed and say how many bytes a number has: behind two layers of keys, 64 bytes a row."""
    place, data = 124 + 2 * (12 + 6 * 64) + 4, bytearray(state.read_bytes())
    assert data[place : place + 8] == struct.pack("<II", 2, 32)
    data[place] = 4
    state.write_bytes(data)
    with pytest.raises(FormatError, match="numbers of 2 bytes; found numbers of 4 bytes; llama_state_seq_save_file"):
        import_llama_cpp(state, backbone=str(backbone_folder("llama")))


def test_numbers_that_no_prefix_has(state: Path, backbone_folder: Folder) -> None:
    data = bytearray(state.read_bytes())
    data[-2:] = np.float16(np.nan).tobytes()
    state.write_bytes(data)
    with pytest.raises(FormatError, match=rf"^{state}: expected finite numbers for decoder.self.layers.1.value; found"):
        import_llama_cpp(state, backbone=str(backbone_folder("llama")))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    for settings, told in (
        ({"dtype": "bfloat16"}, "expected dtype=float16 or float32; found 'bfloat16'"),
        ({"flash": "yes"}, "expected flash=off or on; found 'yes'"),
    ):
        with pytest.raises(ConfigError, match=f"export --llama-cpp: {told}"):
            export_llama_cpp(of_family("llama"), tmp_path / "state", **settings)
    assert list(tmp_path.iterdir()) == []


def test_cells_in_any_order(state: Path, backbone_folder: Folder, tmp_path: Path) -> None:
    """Cells of llama.cpp may lie anywhere; their positions say where they belong."""
    before = import_llama_cpp(state, backbone=str(backbone_folder("llama")))
    data = bytearray(state.read_bytes())
    data[44:48], data[56:60] = data[56:60], data[44:48]
    state.write_bytes(data)
    after = import_llama_cpp(state, backbone=str(backbone_folder("llama")))
    for (key, value), (other, another) in zip(key_values(before), key_values(after), strict=True):
        assert np.array_equal(key[:, [1, 0, 2, 3, 4, 5]], other)
        assert np.array_equal(value[:, [1, 0, 2, 3, 4, 5]], another)


class Binding(SimpleNamespace):
    """What `load_state` calls of llama_cpp: a file of `length` rows of which those from `first` to `last` come in."""

    llama_token = ctypes.c_int32

    def __init__(self, length: int, first: int, last: int) -> None:
        super().__init__(cleared=False)
        self.length, self.first, self.last = length, first, last

    def llama_state_seq_load_file(self, context: Any, name: bytes, to: int, tokens: Any, room: int, count: Any) -> int:
        for index in range(self.length):
            tokens[index] = 9
        count.value = self.length
        return self.length

    def llama_get_memory(self, context: Any) -> str:
        return "memory"

    def llama_memory_seq_pos_min(self, memory: Any, sequence: int) -> int:
        return self.first

    def llama_memory_seq_pos_max(self, memory: Any, sequence: int) -> int:
        return self.last

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        self.cleared = True


def context() -> Any:
    return SimpleNamespace(ctx=None, reset=lambda: None, n_tokens=0, input_ids=np.zeros(16, np.int32))


def test_loading_sees_that_every_row_is_there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = context()
    monkeypatch.setitem(sys.modules, "llama_cpp", Binding(6, 0, 5))
    assert load_state(llama, state) == [9] * 6
    assert llama.n_tokens == 6
    assert list(llama.input_ids[:7]) == [9] * 6 + [0]
    for first, last in ((-6, -1), (-1, -1), (0, 4), (2, 5)):
        binding = Binding(6, first, last)
        monkeypatch.setitem(sys.modules, "llama_cpp", binding)
        with pytest.raises(InputError, match=f"rows at positions 0 to 5 in llama.cpp; found {first} to {last}"):
            load_state(context(), state)
        assert binding.cleared
    monkeypatch.setitem(sys.modules, "llama_cpp", Binding(0, -1, -1))
    for path in (state, state.with_name("none")):
        with pytest.raises(
            InputError, match=r"n_ctx, type_k, type_v, flash_attn; found one that llama\.cpp does not load"
        ):
            load_state(context(), path)


def test_commands(backbone_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, state, back = (str(tmp_path / name) for name in ("p", "state", "back"))
    save(stored(tiny("llama"), backbone_folder("llama")), prefix)
    assert run(["export", "--llama-cpp", prefix, "-o", state]) == 0
    shown = capsys.readouterr()
    assert f'next: load_state(Llama("MODEL.gguf"), "{state}"), of' in shown.out
    assert "float16 rounds the prefix" in shown.out + shown.err
    assert run(["export", "--llama-cpp", prefix, "-o", state, "--dtype", "float32", "--set", "flash=on"]) == 0
    assert 'Llama("MODEL.gguf", type_k=0, type_v=0, flash_attn=True), ' in capsys.readouterr().out
    assert run(["import", "--llama-cpp", state, "--backbone", str(backbone_folder("llama")), "-o", back]) == 0
    assert load(back).manifest.content == load(prefix).manifest.content
