"""An exported decoder in onnxruntime, and batches of texts in it whose cache stays where it was computed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from prefixkit.errors import ConfigError, FormatError, PrefixkitError
from prefixkit.serving.graph_files import check_files
from prefixkit.serving.prefix_table import Array, ServedPrefix, stacked
from prefixkit.serving.report import INPUTS, OUTPUTS, ExportedFolder

Device = Literal["auto", "cpu", "cuda"]
_WARNINGS, _FATAL = 2, 4
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Runtime:
    """The graph of an exported folder, loaded once; `start` begins a batch.

    Attributes:
        device: `cuda` or `cpu`, as onnxruntime chose after it tried.
    """

    def __init__(self, folder: ExportedFolder, *, device: Device = "auto", threads: int | None = None) -> None:
        self.layers = folder.backbone.stacks["decoder"]
        self.dtype = np.dtype(folder.dtype)
        self.takes_positions = folder.takes_positions
        check_files(folder.folder, folder.files)
        self.session = _load(folder.folder / folder.graph, device, threads)
        _check_past(folder, self.session.get_inputs())
        # The list of available providers names those whose libraries are missing, too.
        self.device = "cuda" if _PROVIDERS["cuda"] in self.session.get_providers() else "cpu"
        if device == "cuda" and self.device != "cuda":
            step = "install onnxruntime-gpu with its CUDA libraries, or use --device cpu"
            raise ConfigError("--device", expected="cuda", found="onnxruntime without a usable GPU", next_step=step)

    def start(self, prefixes: Sequence[ServedPrefix | None]) -> Decoding:
        """A batch with one row for each prefix, still without text."""
        past = stacked(prefixes, self.layers, self.dtype)
        mask = np.zeros((len(prefixes), past[0].shape[2]), dtype=np.int64)
        for row, prefix in enumerate(prefixes):
            mask[row, mask.shape[1] - (prefix.length if prefix else 0) :] = 1
        positions = np.array([prefix.text_start if prefix else 0 for prefix in prefixes], dtype=np.int64)
        return Decoding(self, [self._on_device(array) for array in past], mask, positions)

    def _on_device(self, array: Array) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)


@dataclass
class Decoding:
    """A batch of texts in progress.

    Attributes:
        past: key and value of each layer, [batch, kv_heads, past, head_dim], on the device.
        mask: [batch, past], 1 where a slot holds a token or a piece of prefix.
        positions: [batch], the position id of each row's next token.
    """

    runtime: Runtime
    past: list[Any]
    mask: Array
    positions: Array

    def feed(self, rows: Sequence[Sequence[int]]) -> Array:
        """Append token ids to each row and return the logits [batch, seq, vocab] of those appended.

        Rows may differ in length and may be empty: shorter ones are padded on the left, where logits mean nothing.
        """
        seq = max(map(len, rows))
        ids = np.zeros((len(rows), seq), dtype=np.int64)
        real = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, seq - len(tokens) :], real[row, seq - len(tokens) :] = tokens, 1
        position_ids = np.maximum(self.positions[:, None] + real.cumsum(-1) - 1, 0) * real
        self.mask = np.concatenate([self.mask, real], axis=-1)
        self.positions = self.positions + real.sum(-1)
        return self._run(ids, position_ids)

    def _run(self, ids: Array, position_ids: Array) -> Array:
        session = self.runtime.session
        binding = session.io_binding()
        binding.bind_cpu_input(INPUTS["input_ids"], ids)
        binding.bind_cpu_input(INPUTS["attention_mask"], self.mask)
        if self.runtime.takes_positions:
            binding.bind_cpu_input(INPUTS["position_ids"], position_ids)
        for name, value in zip(_per_layer(INPUTS, "past", len(self.past)), self.past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(OUTPUTS["logits"], "cpu")
        for name in _per_layer(OUTPUTS, "present", len(self.past)):
            binding.bind_output(name, self.runtime.device)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own bare exception types: out of memory, a broken kernel
            raise PrefixkitError("onnxruntime", found=_first_line(error)) from error
        logits, *self.past = binding.get_outputs()
        result: Array = logits.numpy()
        return result


def _per_layer(names: dict[str, str], which: str, tensors: int) -> Iterator[str]:
    for layer in range(tensors // 2):
        yield names[f"{which}_key_names"] % layer
        yield names[f"{which}_value_names"] % layer


def _load(path: Path, device: Device, threads: int | None) -> Any:
    providers = _providers(device)
    options = onnxruntime.SessionOptions()
    # What goes wrong is raised as well, and told in one line.
    options.log_severity_level = _FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        with _without_provider_noise():
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # as above; a file that is missing, cut or of a newer opset
        raise FormatError(path, expected="a graph that onnxruntime can load", found=_first_line(error)) from error


def _check_past(folder: ExportedFolder, inputs: Sequence[Any]) -> None:
    """Raise FormatError where the graph's cache is not the one that the report describes."""
    type_ = {"float32": "tensor(float)", "float16": "tensor(float16)"}[folder.dtype]
    layers = folder.backbone.stacks["decoder"]
    dims = [(layer.kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    names = _per_layer(INPUTS, "past", len(dims))
    expected = {name: (type_, heads, dim) for name, (heads, dim) in zip(names, dims, strict=True)}
    others = {name for name in INPUTS.values() if "%d" not in name}
    found = {one.name: (one.type, one.shape[1], one.shape[-1]) for one in inputs if one.name not in others}
    if found != expected:
        raise FormatError(
            folder.folder / folder.graph,
            expected=f"the past that export.json describes: {len(dims)} tensors of {folder.dtype}",
            found=", ".join(sorted({f"{type_} of {heads} heads of {dim}" for type_, heads, dim in found.values()})),
            next_step="export again",
        )


def _providers(device: Device) -> list[str]:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError("--device", expected="auto, cpu or cuda", found=repr(device))
    if device == "cpu" or _PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return [_PROVIDERS["cpu"]]
    # Finds the CUDA libraries that pip installed, which the system's loader does not know.
    with _without_provider_noise():
        onnxruntime.preload_dlls()
    return list(_PROVIDERS.values())


@contextmanager
def _without_provider_noise() -> Iterator[None]:
    # A GPU build on a machine without CUDA logs and prints errors for what is a normal answer.
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
