"""The adapter file of ONNX Runtime (`.onnx_adapter`): named tensors that take the place of a graph's own defaults.

The graph is that of `prefixkit export --genai`, whose inputs `prefix.N.key|value` are filled by it, in Python, C, C++,
C# and onnxruntime-genai. One session runs any number of adapters, one a call. Measured with onnxruntime 1.31.1.

ONNX Runtime compares an adapter with no model. Its field for a version of the model carries 31 bits of the backbone's
weights hash (`model_version`), which the graph states as well, as `prefixkit.model_version` in its metadata.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.decoder_prefix import keys_and_values
from prefixkit.bridges.narrowed import narrowed
from prefixkit.bridges.prefixed_graph import PREFIX
from prefixkit.errors import ConfigError
from prefixkit.format.atomic import write_bytes
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.prefix import Array, Prefix

TITLE = "an adapter of ONNX Runtime"
DTYPES = ("float32", "float16")
_NEXT = (
    'session = onnxruntime.InferenceSession("FOLDER/model.onnx") of the FOLDER that `prefixkit export --genai` wrote; '
    "adapter = onnxruntime.LoraAdapter(); adapter.Load({}); options = onnxruntime.RunOptions(); "
    "options.add_active_adapter(adapter); session.run(None, inputs, options)"
)
_VERSION = 1
"""Of what the tensors are called."""


def export_onnx_adapter(prefix: Prefix, output: str | Path, *, dtype: str = "float32") -> Carried:
    """Write `prefix` to the file `output`, for a folder that `prefixkit export --genai` wrote of its backbone.

    Args:
        dtype: of the graph that takes it, float32 or float16.

    Raises:
        ConfigError: another dtype.
        FormatError: something besides keys and values right before the text of a decoder, or numbers that `dtype`
            cannot hold.
        InputError: a file that cannot be written; what was there stays.
    """
    output = Path(output)
    check_dtype(dtype)
    lost = write_adapter(prefix, output, dtype)
    if prefix.manifest.backbone.weights_hash is None:
        lost = (*lost, "the weights of the backbone are unknown, so that the adapter's model version is 0")
    return Carried(output=output, next=_NEXT.format(repr(str(output))), lost=lost)


def check_dtype(dtype: str) -> None:
    """Raise ConfigError where no graph has inputs of `dtype`."""
    if dtype not in DTYPES:
        raise ConfigError("dtype", expected=" or ".join(DTYPES), found=repr(dtype))


def write_adapter(prefix: Prefix, output: Path, dtype: str) -> tuple[str, ...]:
    """Write the file alone; see `export_onnx_adapter`. Gives what `dtype` cannot hold, a sentence each."""
    import onnxruntime

    tensors, lost = fitted(prefix, dtype)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(model_version(prefix.manifest.backbone))
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    # ONNX Runtime writes to a path of its own accord, and not atomically.
    with TemporaryDirectory() as made:
        adapter.export_adapter(str(Path(made) / "adapter"))
        write_bytes(output, (Path(made) / "adapter").read_bytes())
    return lost


def fitted(prefix: Prefix, dtype: str = "float32") -> tuple[dict[str, Array], tuple[str, ...]]:
    """What a prefixed graph of `dtype` is fed, [1, kv_heads, prefix, head_dim] by name, and what was rounded for it.

    Raises FormatError as the export does.
    """
    pairs, lost = narrowed(
        keys_and_values(prefix, TITLE), dtype, otherwise="use --dtype float32, for graph and adapter"
    )
    names = [(key % layer, value % layer) for layer in range(len(pairs)) for key, value in (PREFIX,)]
    tensors = zip(chain.from_iterable(names), chain.from_iterable(pairs), strict=True)
    return {name: np.ascontiguousarray(tensor)[None] for name, tensor in tensors}, lost


def model_version(backbone: BackboneIdentity) -> int:
    """The first 32 bits of the hash of the weights without the highest, which would be a sign; 0 where unknown."""
    digest = (backbone.weights_hash or "").rpartition(":")[2]
    return int(digest[:8] or "0", 16) & 0x7FFFFFFF
