"""Ctrl-C in the middle of a real training process keeps what was done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from prefixkit.prefix import load
from prefixkit.training.checkpoint import path_of


def test_ctrl_c_keeps_the_prefix_and_the_state(
    backbone_folder: Callable[..., Path], records: Path, tmp_path: Path
) -> None:
    output = tmp_path / "p.safetensors"
    command = [sys.executable, "-m", "prefixkit", "train", "--backbone", str(backbone_folder("gpt2"))]
    command += ["--data", str(records), "-o", str(output), "--length", "3", "--batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        told = process.stderr.read()
    assert process.returncode == 130, told
    assert "stopped at step" in told
    assert "Traceback" not in told
    assert load(output).manifest.provenance.metrics["steps"] >= 1
    assert path_of(output).is_file()
