"""One graph in onnxruntime: loaded where it can run, checked against its report, run with its cache on the device."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from prefixkit.errors import ConfigError, FormatError, PrefixkitError
from prefixkit.format.manifest import LayerGeometry
from prefixkit.serving.huge_pages import in_huge_pages
from prefixkit.serving.prefix_table import Array

Device = Literal["auto", "cpu", "cuda"]
MOST_THREADS = 1024
"""Starting many more takes longer than anybody waits, and onnxruntime says nothing of it."""
_WARNINGS, _FATAL = 2, 4
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Graph:
    """A graph, loaded.

    Attributes:
        device: `cuda` or `cpu`, as onnxruntime chose after it tried.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        threads: int | None,
        *,
        mapped: bool = False,
        fixed: Mapping[str, int] | None = None,
    ) -> None:
        """Load the graph at `path`.

        Args:
            mapped: on a CPU, multiply by the weights as they lie in their file, which is mapped into memory, rather
                than by copies in another order: they take no memory of their own, and a pass takes up to 1.3 times as
                long.
            fixed: sizes of all dimensions that are free, by name. On a GPU the work of a pass is recorded then (a CUDA
                graph), and repeated on the memory that was bound for the first.
        """
        self.path = path
        with nullcontext() if mapped else in_huge_pages():
            self.session = _load(path, device, _options(threads, mapped, fixed or {}), recorded=bool(fixed))
        # The list of available providers names those whose libraries are missing, too.
        self.device = "cuda" if _PROVIDERS["cuda"] in self.session.get_providers() else "cpu"
        if device == "cuda" and self.device != "cuda":
            step = "install onnxruntime-gpu with its CUDA libraries, or use --device cpu"
            raise ConfigError("--device", expected="cuda", found="onnxruntime without a usable GPU", next_step=step)

    def on_device(self, array: Array) -> Any:
        """`array` where the graph runs."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def room(self, shape: Sequence[int], dtype: type[np.generic]) -> Any:
        """A tensor where the graph runs, for what it writes: nothing is sent there."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, 0)

    def run(
        self, arrays: Mapping[str, Array], values: Mapping[str, Any], outputs: Sequence[str], kept: Sequence[str]
    ) -> list[Any]:
        """Run the graph.

        Args:
            arrays: inputs on the CPU, by name.
            values: inputs that are on the device.
            outputs: the names of outputs that are wanted on the CPU.
            kept: of outputs that stay on the device.

        Returns:
            `outputs`, then `kept`, as onnxruntime holds them.
        """
        binding = self.session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        for name in kept:
            binding.bind_output(name, self.device)
        self.run_bound(binding)
        found: list[Any] = binding.get_outputs()
        return found

    def run_bound(self, binding: Any) -> None:
        """Run the graph on what is bound, inputs and outputs."""
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises its own bare exception types: out of memory, a broken kernel
            raise PrefixkitError("onnxruntime", found=first_line(error)) from error

    @property
    def inputs(self) -> frozenset[str]:
        """The names of its inputs."""
        return frozenset(one.name for one in self.session.get_inputs())

    def check(self, caches: Mapping[str, tuple[int, int]], plain: Sequence[str], dtype: str) -> None:
        """Raise FormatError where the inputs are not those that the report describes.

        Args:
            caches: kv_heads and head_dim of each input of keys or values.
            plain: the names of all other inputs that there may be.
        """
        type_ = "tensor(float)" if dtype == "float32" else f"tensor({dtype})"
        expected = {name: (type_, heads, dim) for name, (heads, dim) in caches.items()}
        inputs = self.session.get_inputs()
        found = {one.name: (one.type, one.shape[1], one.shape[-1]) for one in inputs if one.name not in plain}
        if found != expected:
            raise FormatError(
                self.path,
                expected=f"the past that export.json describes: {len(caches)} tensors of {dtype}",
                found=", ".join(sorted({f"{type_} of {heads} heads of {dim}" for type_, heads, dim in found.values()})),
                next_step="export again",
            )


def per_layer(names: Mapping[str, str], which: str, layers: int) -> Iterator[str]:
    """The names of key and value of each layer, in the order of the graph; `which` is `past`, `present`, …"""
    for layer in range(layers):
        yield names[f"{which}_key_names"] % layer
        yield names[f"{which}_value_names"] % layer


def cache_shapes(names: Mapping[str, str], which: str, layers: Sequence[LayerGeometry]) -> dict[str, tuple[int, int]]:
    """kv_heads and head_dim of the keys and values of each layer, by name."""
    shapes = [(layer.kv_heads, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    return dict(zip(per_layer(names, which, len(layers)), shapes, strict=True))


def first_line(error: Exception) -> str:
    """What it says, as far as it fits in a line; what it is, where it says nothing, as a bare MemoryError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def padded(rows: Sequence[Sequence[int]], *, left: bool = True) -> tuple[Array, Array]:
    """Token ids [batch, longest], padded with 0, and 1 where they are real."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    real = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        where = slice(longest - len(tokens), None) if left else slice(0, len(tokens))
        ids[row, where], real[row, where] = tokens, 1
    return ids, real


def _options(threads: int | None, mapped: bool, fixed: Mapping[str, int]) -> Any:
    options = onnxruntime.SessionOptions()
    # What goes wrong is raised as well, and told in one line.
    options.log_severity_level = _FATAL
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise ConfigError("threads", expected=f"from 1 to {MOST_THREADS}", found=f"{threads}")
        options.intra_op_num_threads = threads
    for name, size in fixed.items():
        options.add_free_dimension_override_by_name(name, size)
    return options


def _load(path: Path, device: Device, options: Any, *, recorded: bool) -> Any:
    providers: list[Any] = _providers(device)
    if recorded and providers[0] == _PROVIDERS["cuda"]:
        providers[0] = (providers[0], {"enable_cuda_graph": "1"})
    try:
        with _without_provider_noise():
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # as above; a file that is missing, cut or of a newer opset
        raise FormatError(path, expected="a graph that onnxruntime can load", found=first_line(error)) from error


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
