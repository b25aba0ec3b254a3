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
from prefixkit.bridges.soft_prompt import prompt_vectors
from prefixkit.errors import BackboneError, FormatError, MismatchError
from prefixkit.format import names
from prefixkit.format.atomic import replacing
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, Manifest, Positions, Provenance
from prefixkit.prefix import Array, Prefix

_TITLE = "google-research/prompt-tuning"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_WANTED = "a NumPy array [prefix, hidden] of float32, float16 or bfloat16"


def export_google_prompt(prefix: Prefix, output: Path) -> Carried:
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
    return Carried(output=output, next=f"{gin} in the gin file", lost=lost)


def import_google_prompt(source: Path, *, backbone: str | None = None) -> Prefix:
    """The soft prompt in a NumPy file, bound to the weights of `backbone`: a decoder or an encoder-decoder.

    Raises:
        FormatError: no such file, Python objects in it, another shape or dtype.
        BackboneError: no backbone, or one that cannot be used.
        MismatchError: vectors of another width than the backbone's.
    """
    vectors = _read(source)
    if backbone is None:
        found = "a file that names none"
        raise BackboneError(source, expected="the backbone", found=found, next_step="give it with --backbone")
    identity, stack = _identity(source, backbone)
    if identity.hidden_size != vectors.shape[1]:
        expected = f"vectors of the backbone's width {identity.hidden_size}"
        step = "give the backbone that the prompt was trained on"
        raise MismatchError(source, expected=expected, found=str(vectors.shape[1]), next_step=step)
    record = InjectionRecord(
        kind="embedding_prompt",
        stack=stack,
        length=len(vectors),
        placement="prepend",
        positions=Positions(text_start=len(vectors)),
    )
    config = {"imported_from": "google-prompt"}
    provenance = Provenance(method="prompt-tuning", prefixkit=__version__, config=config)
    manifest = Manifest(backbone=identity, injections=(record,), provenance=provenance)
    return Prefix(manifest, {names.PROMPT: vectors})


def _identity(source: Path, backbone: str) -> tuple[BackboneIdentity, str]:
    """Who the backbone is, and at whose input its prompts stand."""
    from prefixkit.backbones.load import load_backbone

    loaded = load_backbone(backbone)
    if loaded.kind == "encoder":
        expected = "a decoder or an encoder-decoder, for a prompt before the text"
        raise BackboneError(source, expected=expected, found=f"{loaded.identity.family}, an encoder")
    return loaded.identity, "decoder" if loaded.kind == "decoder" else "encoder"


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
