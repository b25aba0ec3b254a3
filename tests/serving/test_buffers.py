"""Memory for texts: bytes of every dtype where a device has them, and complaints that say what was wrong."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.buffers import Buffers
from prefixkit.serving.prefix_table import ServedPrefix
from prefixkit.serving.report import read_report
from tests.exported import exported

LAYERS = (LayerGeometry(kv_heads=2, key_dim=4, value_dim=4),)
PREFIX = tuple(np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(ml_dtypes.bfloat16) for _ in range(2))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the CPU where that of a GPU is asked for."""
    for name, place in (("ortvalue_from_shape_and_type", 2), ("ortvalue_from_numpy", 1)):
        monkeypatch.setattr(onnxruntime.OrtValue, name, staticmethod(_on_cpu(name, place)))


def _on_cpu(name: str, place: int) -> Any:
    made = getattr(onnxruntime.OrtValue, name)

    def make(*given: Any) -> Any:
        assert given[place] == "cuda"
        return made(*given[:place], "cpu", *given[place + 1 :])

    return make


@pytest.mark.usefixtures("gpu")
def test_bfloat16_reaches_a_gpu_to_the_bit() -> None:
    buffers = Buffers(LAYERS, 2, 5, "bfloat16", "cuda")
    for value, tensor in zip(buffers.on_device(ServedPrefix(PREFIX, 3, 3, None)), PREFIX, strict=True):
        assert (value.data_type(), value.shape()) == ("tensor(bfloat16)", [1, 2, 3, 4])
        assert _bits(value) == tensor.tobytes()
    assert all(_bits(value) == bytes(2 * 2 * 5 * 4 * 2) for value in buffers._values)


def _bits(value: Any) -> bytes:
    return ctypes.string_at(value.data_ptr(), 2 * int(np.prod(value.shape())))


def test_a_complaint_of_the_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 4096\nmore lines")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", staticmethod(full))
    with pytest.raises(ConfigError, match=r"not so much \(Failed to allocate .* 4096\); take fewer rows"):
        Buffers(LAYERS, 2, 5, "float16", "cuda")


def test_memory_that_ran_out_without_a_word_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", staticmethod(full))
    with pytest.raises(ConfigError, match=r"not so much \(MemoryError\); take fewer rows"):
        Buffers(LAYERS, 2, 5, "float16", "cuda")


def test_a_fault_of_ours_is_not_told_as_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime.OrtValue, "ortvalue_from_numpy")
    with pytest.raises(AttributeError):
        Buffers(LAYERS, 2, 5, "float16", "cpu")


def test_a_row_is_bound_once_and_keeps_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = BufferedRuntime(read_report(exported("gpt2", target="cuda").folder), device="cpu", threads=1)
    buffers, bound, given = runtime.rows(2, 16).buffers, [], {}
    bind, give = Buffers.bind, onnxruntime.IOBinding.bind_ortvalue_input
    monkeypatch.setattr(Buffers, "bind", lambda self, *rows: (bound.append(rows[1:]), bind(self, *rows)))

    def remember(self: Any, name: str, value: Any) -> None:
        given[name] = value
        give(self, name, value)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", remember)
    shapes = [(layer.kv_heads, layer.key_dim) for layer in runtime.layers for _ in range(2)]
    for row, length in ((0, 3), (1, 5), (0, 7), (1, 2)):
        tensors = tuple(np.full((heads, length, dim), length, np.float32) for heads, dim in shapes)
        buffers.place(runtime.places, row, buffers.on_device(ServedPrefix(tensors, length, length, None)))
        assert all((value.numpy()[row, :, :length] == length).all() for value in buffers._values)
    # What was longer before is still there behind the shorter one.
    assert all((value.numpy()[1, 0, :, 0] == [2] * 2 + [5] * 3 + [0] * 11).all() for value in buffers._values)
    assert bound == [(0, 1), (1, 2)]
    assert list(given.values()) == buffers._values
