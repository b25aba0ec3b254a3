"""onnxruntime-genai beside ours: its model builder, and a process that writes when it is asked to.

It cannot take a prefix and reads as many more tokens of prompt instead. Its package wants the onnxruntime for the CPU,
which would overwrite the one for GPUs, so it lives in an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.serving_work import Tokens, Turn, Work

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class NoGenaiError(RuntimeError):
    """The model builder does not know this family, or nothing can be run; in one line."""


class Genai:
    """A process with the model, which is built for it once."""

    def __init__(self, work: Work, python: str) -> None:
        self.work, child = work, Path(__file__).with_name("genai_child.py")
        folder = built(work, python)
        command = [python, str(child), str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.peak = 0.0

    def prompts(self) -> list[Tokens]:
        """As many tokens as prefix and prompt of the others have."""
        return self.work.prompts(self.work.length + self.work.prompt)

    def write(self, prompts: Sequence[Tokens] | None = None) -> Turn:
        """Every row once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": prompts or self.prompts(), "new": self.work.new}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise NoGenaiError(_last_line(self.process.communicate()[1]))
        answer = json.loads(line)
        self.peak = answer.pop("peak")
        return Turn(**answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def built(work: Work, python: str) -> Path:
    """What the model builder makes of the backbone, in a folder beside the exports; made once."""
    graphed = work.device == "cuda" and work.rows == 1
    folder = Path(work.buffered).with_name(f"genai-{work.device}{'-graph' if graphed else ''}")
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.part")
        command = [python, "-m", "onnxruntime_genai.models.builder", "-i", work.backbone, "-o", str(making)]
        command += ["-p", _PRECISIONS[work.dtype], "-e", work.device, "-c", str(folder.with_name("genai-cache"))]
        options = ["--extra_options", "enable_cuda_graph=true"] if graphed else []
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoGenaiError(_last_line(done.stderr))
        making.rename(folder)
    _configure(folder / "genai_config.json", work)
    return folder


def _configure(path: Path, work: Work) -> None:
    """Give it the threads of the others, and to end a text a token that random weights hardly write."""
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = work.threads
    path.write_text(json.dumps(config, indent=1))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]
