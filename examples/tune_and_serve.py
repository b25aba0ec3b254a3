"""A prefix trained, exported and served over HTTP, and asked as OpenAI's clients ask. Run it from anywhere."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from urllib.request import Request, urlopen

from prefixkit import TrainConfig, export_onnx, train
from prefixkit.quickstart import BACKBONE, E2E


def main(steps: int = 100) -> None:
    folder = Path(mkdtemp())
    config = TrainConfig(
        backbone=str(BACKBONE),
        data=str(E2E / "train.jsonl.gz"),
        output=str(folder / "restaurants.safetensors"),
        task="e2e",
        steps=steps,
    )
    export_onnx(train(config), BACKBONE, folder / "served", target="cuda")  # for rows in one batch; runs on a CPU too
    asked = json.loads((E2E / "test.jsonl").read_text().splitlines()[0])["input"]
    with served(folder / "served") as address:
        for model in (entry["id"] for entry in ask(f"{address}/v1/models")["data"]):
            body = {"model": model, "prompt": asked, "temperature": 0, "max_tokens": 40}
            print(f"{model}: {ask(f'{address}/v1/completions', body)['choices'][0]['text']}")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of `prefixkit serve` on a free port."""
    command = [sys.executable, "-m", "prefixkit", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def ask(url: str, body: object = None) -> dict:
    request = Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return json.load(response)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
