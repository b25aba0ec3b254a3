"""One model and five prefixes in one batch: each row of it behind a prefix of its own. Run it from anywhere."""

import sys
from pathlib import Path
from tempfile import mkdtemp

from prefixkit import Session, capture, export_onnx
from prefixkit.quickstart import BACKBONE

TRAINED = Path(__file__).parent / "web" / "prefixes"
ATTRIBUTES = "name : The Waterman | Type : pub | food : Italian | area : riverside | near : Raja Indian Cuisine"
SENTENCE = "The Waterman is a pub that serves Italian food by the riverside, near Raja Indian Cuisine."
SHOTS = "name : Aromi | Type : restaurant => Aromi is a restaurant .\nname : Zizzi | Type : pub => Zizzi is a pub .\n"


def main(tokens: int = 80) -> None:
    folder = Path(mkdtemp()) / "served"
    export_onnx(None, BACKBONE, folder)
    session = Session(folder)
    for file in sorted(TRAINED.glob("*.safetensors")):
        session.add_prefix(file.stem, file)
    session.add_prefix("captured", capture(BACKBONE, SHOTS))
    names = list(session.prefixes)
    asked = [{"record": SENTENCE, "captured": f"{ATTRIBUTES} =>"}.get(name, ATTRIBUTES) for name in names]
    for name, written in zip(names, session.generate(asked, names, max_new_tokens=tokens), strict=True):
        print(f"{name}\n  " + written.text.strip().replace("\n", "\n  "))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
