"""The adapter file of ONNX Runtime (`.onnx_adapter`): named tensors that take the place of a graph's own defaults.

The graph is that of `prefixkit export --genai`, whose inputs `prefix.N.key|value` are filled by it, in Python, C, C++,
C# and onnxruntime-genai. One session runs any number of adapters, one a call. Measured with onnxruntime 1.31.1.

ONNX Runtime compares an adapter with no model. Its field for a version of the model carries 31 bits of the backbone's
weights hash (`model_version`), which the graph states as well, as `prefixkit.model_version` in its metadata.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.bridges.prefixed_graph import PREFIX
from prefixkit.format.atomic import write_bytes
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.prefix import Array, Prefix
from prefixkit.serving.prefix_table import converted

TITLE = "an adapter of ONNX Runtime"
_VERSION = 1
"""Of what the tensors are called."""


def export_onnx_adapter(prefix: Prefix, output: Path, *, dtype: str = "float32") -> Carried:
    """Write `prefix` to the file `output`, for a folder that `prefixkit export --genai` wrote of its backbone.

    Args:
        dtype: of the graph that takes it, float32 or float16.

    Raises:
        FormatError: something besides keys and values right before the text of a decoder.
        InputError: numbers that `dtype` cannot hold, or a file that cannot be written; what was there stays.
    """
    write_adapter(prefix, output, dtype)
    lost = lost_in(prefix, dtype)
    if prefix.manifest.backbone.weights_hash is None:
        lost = (*lost, "the weights of the backbone are unknown, so that the adapter's model version is 0")
    return Carried(output=output, next=f'adapter = onnxruntime.LoraAdapter(); adapter.Load("{output}")', lost=lost)


def write_adapter(prefix: Prefix, output: Path, dtype: str) -> None:
    """Write the file alone; see `export_onnx_adapter`."""
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(model_version(prefix.manifest.backbone))
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs(prefix, dtype).items()}
    adapter.set_parameters(values)
    # ONNX Runtime writes to a path of its own accord, and not atomically.
    with TemporaryDirectory() as made:
        adapter.export_adapter(str(Path(made) / "adapter"))
        write_bytes(output, (Path(made) / "adapter").read_bytes())


def inputs(prefix: Prefix, dtype: str = "float32") -> dict[str, Array]:
    """What a prefixed graph of `dtype` is fed, [1, kv_heads, prefix, head_dim] by name. Raises as the export does."""
    keys_and_values(prefix, TITLE)
    tensors = converted(prefix, "decoder", "self", np.dtype(dtype))
    names = [name % layer for layer in range(len(tensors) // 2) for name in PREFIX]
    return {name: tensor[None] for name, tensor in zip(names, tensors, strict=True)}


def lost_in(prefix: Prefix, dtype: str) -> tuple[str, ...]:
    """What a graph of `dtype` cannot hold of `prefix`."""
    stored = sorted({str(array.dtype) for array in prefix.tensors.values()} - {dtype})
    if dtype != "float16" or not stored:
        return ()
    return (f"numbers were rounded from {' and '.join(stored)} to float16",)


def model_version(backbone: BackboneIdentity) -> int:
    """The first 32 bits of the hash of the weights without the highest, which would be a sign; 0 where unknown."""
    digest = (backbone.weights_hash or "").rpartition(":")[2]
    return int(digest[:8] or "0", 16) & 0x7FFFFFFF
