"""Assemble the page as a folder of static files: `python -m examples.web.build NODE_MODULES [OUTPUT]`.

NODE_MODULES is where npm put the page's libraries: `npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0`.
Any server of files will do then: `python -m http.server --directory OUTPUT`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import prefixkit
from prefixkit.errors import ConfigError, InputError
from prefixkit.format.atomic import replacing_folder
from prefixkit.quickstart import BACKBONE

WEB = Path(__file__).parent
LIBRARIES = (
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)


def assemble(node_modules: Path, output: Path) -> Path:
    """Write page, model, prefixes and libraries to the new folder `output`, whole or not at all, and return it.

    Raises:
        ConfigError: a library is not there.
        InputError: `output` cannot be written, or has something in it.
    """
    missing = [library for library in LIBRARIES if not (node_modules / library).is_file()]
    if missing:
        step = "npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0"
        raise ConfigError(node_modules, expected=missing[0], found="no such file", next_step=step)
    with replacing_folder(output) as folder:
        _copy(node_modules, folder)
        prefixkit.export_onnx(None, BACKBONE, folder / "model", weights="inline")
    return output


def _copy(node_modules: Path, folder: Path) -> None:
    for path in (*WEB.glob("*.html"), *WEB.glob("*.css"), *WEB.glob("*.mjs")):
        shutil.copy(path, folder)
    shutil.copytree(WEB / "prefixes", folder / "prefixes")
    (folder / "javascript").mkdir()
    for path in (WEB.parent / "javascript").glob("*.mjs"):
        shutil.copy(path, folder / "javascript")
    (folder / "lib").mkdir()
    for library in LIBRARIES:
        shutil.copy(node_modules / library, folder / "lib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Assemble the page and say how to look at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("prefixkit-page"))
    asked = parser.parse_args(arguments)
    try:
        assemble(asked.node_modules, asked.output)
    except InputError as error:
        parser.exit(2, f"Error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Error: interrupted; nothing was written\n")
    print(f"wrote {asked.output}; next: python -m http.server --directory {asked.output}")


if __name__ == "__main__":
    main()
