"""The prompts of google-research/prompt-tuning (Lester et al. 2021, arXiv 2104.08691), there and back, bit for bit.

A prompt is one array [prefix, hidden] in a NumPy file, in float32. It stands before the input of T5's encoder, or
before the text of a decoder. The file names no backbone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prefixkit import __version__
from prefixkit.bridges.carried import Carried
from prefixkit.bridges.described import described, refuse_other_width, refuse_too_long
from prefixkit.bridges.imported import prompt_record, refuse_not_finite
from prefixkit.bridges.soft_prompt import prompt_vectors
from prefixkit.errors import FormatError
from prefixkit.format import names
from prefixkit.format.atomic import replacing
from prefixkit.format.manifest import Manifest, Provenance
from prefixkit.prefix import Array, Prefix

_TITLE = "google-research/prompt-tuning"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_WANTED = "a NumPy array [prefix, hidden] of float32, float16 or bfloat16"


def export_google_prompt(prefix: Prefix, output: str | Path) -> Carried:
    """Write the vectors of `prefix` as a NumPy file for `prompts.np_load`.

    Raises:
        FormatError: something besides a soft prompt before the text.
        InputError: the file cannot be written.
    """
    vectors = prompt_vectors(prefix, _TITLE, stacks=("decoder", "encoder"))
    lost: tuple[str, ...] = ()
    if vectors.dtype == _BFLOAT16:
        vectors = vectors.astype(np.float32)
        lost = ("NumPy files have no bfloat16: it is float32 there, no number changed",)
    with replacing(output) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(vectors), allow_pickle=False)
    gin = f'prompts.from_array.prompt = @prompts.np_load(), prompts.np_load.path = "{output}"'
    return Carried(output=Path(output), next=f"{gin} in the gin file", lost=lost)


def import_google_prompt(source: str | Path, *, backbone: str | Path | None = None) -> Prefix:
    """The soft prompt in a NumPy file, bound to the weights of `backbone`: a decoder or an encoder-decoder.

    Raises:
        FormatError: no such file, Python objects in it, another shape or dtype, NaN or Infinity.
        BackboneError: no backbone, or one that cannot be used.
        MismatchError: vectors of another width than the backbone's, or more of them than it has positions.
    """
    path = Path(source)
    vectors = _read(path)
    known = described(path, backbone=backbone)
    length, width = vectors.shape
    refuse_other_width(path, width, known)
    refuse_too_long(path, length, known)
    refuse_not_finite(path, {names.PROMPT: vectors})
    record = prompt_record(length, pair=known.is_pair)
    config = {"imported_from": "google-prompt"}
    provenance = Provenance(method="prompt-tuning", prefixkit=__version__, config=config)
    manifest = Manifest(backbone=known.identity(), injections=(record,), provenance=provenance)
    return Prefix(manifest, {names.PROMPT: vectors})


def _read(path: Path) -> Array:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FormatError(path, expected=_WANTED, found=found, next_step="check the path")
    try:
        # Mapped: a header that promises more than the file holds costs nothing. Objects cannot be mapped.
        stored: Any = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, SyntaxError, TypeError) as error:
        raise FormatError(path, expected=_WANTED, found=_why(error)) from error
    # What JAX saves of bfloat16 has no name in a NumPy file, and reads as two bytes of nothing.
    if stored.dtype == np.dtype("V2"):
        stored = stored.view(_BFLOAT16)
    if stored.ndim != 2 or not stored.size or stored.dtype.newbyteorder("=") not in (np.float32, np.float16, _BFLOAT16):
        raise FormatError(path, expected=_WANTED, found=f"{list(stored.shape)} of {stored.dtype}")
    return np.array(stored, dtype=stored.dtype.newbyteorder("="), order="C", subok=False)


def _why(error: Exception) -> str:
    return "Python objects, which are not read" if "Python objects" in str(error) else f"a file that is none: {error}"
