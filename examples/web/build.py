"""Assemble the page as a folder of static files: `python -m examples.web.build NODE_MODULES [OUTPUT]`.

NODE_MODULES is where npm put the page's libraries: `npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0`.
Any server of files will do then: `python -m http.server --directory OUTPUT`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import prefixkit
from prefixkit.errors import ConfigError, InputError
from prefixkit.quickstart import BACKBONE

WEB = Path(__file__).parent
LIBRARIES = (
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
)


def assemble(node_modules: Path, output: Path) -> Path:
    """Write page, model, prefixes and libraries to the new folder `output`, and return it.

    Raises:
        ConfigError: a library is not there, or `output` is.
    """
    _check(node_modules, output)
    output.mkdir(parents=True)
    for path in (*WEB.glob("*.html"), *WEB.glob("*.css"), *WEB.glob("*.mjs")):
        shutil.copy(path, output)
    shutil.copytree(WEB / "prefixes", output / "prefixes")
    (output / "javascript").mkdir()
    for path in (WEB.parent / "javascript").glob("*.mjs"):
        shutil.copy(path, output / "javascript")
    (output / "lib").mkdir()
    for library in LIBRARIES:
        shutil.copy(node_modules / library, output / "lib")
    prefixkit.export_onnx(None, BACKBONE, output / "model", weights="inline")
    return output


def _check(node_modules: Path, output: Path) -> None:
    missing = [library for library in LIBRARIES if not (node_modules / library).is_file()]
    if missing:
        step = "npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0"
        raise ConfigError(node_modules, expected=missing[0], found="no such file", next_step=step)
    if output.exists():
        raise ConfigError(output, expected="a new folder", found="one that exists", next_step="name another")


def main() -> None:
    """Assemble the page and say how to look at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("prefixkit-page"))
    asked = parser.parse_args()
    try:
        assemble(asked.node_modules, asked.output)
    except InputError as error:
        parser.exit(2, f"Error: {error}\n")
    print(f"wrote {asked.output}; next: python -m http.server --directory {asked.output}")


if __name__ == "__main__":
    main()
