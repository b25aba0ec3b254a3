"""Few-shot examples read once: their keys and values as a prefix that onnxruntime serves. Run it from anywhere."""

import json
import sys
from pathlib import Path
from tempfile import mkdtemp

from prefixkit import Session, capture, export_onnx, save
from prefixkit.quickstart import BACKBONE, E2E


def main(shots: int = 4) -> None:
    folder = Path(mkdtemp())
    rows = [json.loads(line) for line in (E2E / "test.jsonl").read_text().splitlines()[: shots + 1]]
    context = "".join(f" {row['input']} => {row['target'][0]}\n" for row in rows[:shots])

    prefix = save(capture(BACKBONE, context), folder / "context.safetensors")
    print(prefix.manifest.injections[0].length, "tokens are read once, and never again")
    export_onnx(prefix, BACKBONE, folder / "served")

    session = Session(folder / "served")
    asked = [f" {rows[shots]['input']} =>"]
    print("with the context   ", session.generate(asked, max_new_tokens=30)[0].text)
    print("without            ", session.generate(asked, None, max_new_tokens=30)[0].text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
