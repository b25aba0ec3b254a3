"""The JavaScript modules on onnxruntime-node, onnxruntime-web and transformers.js, with PyTorch as the oracle."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prefixkit.serving.session import OWN, Session
from tests.bridges.javascript_cases import write_cases
from tests.exported import exported

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "javascript"
MODULES = TESTS / "node_modules"
FAMILIES = ("gpt2", "llama")


def node(*arguments: str | Path, cases: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A finished Node, which needs the packages of tests/javascript."""
    assert MODULES.is_dir(), f"{MODULES}: expected the packages of package-lock.json; run tests/install_runtimes"
    environment = {**os.environ, **({"PREFIXKIT_CASES": str(cases)} if cases else {})}
    command = ["node", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False)
    # What a model writes may hold carriage returns, which text mode would translate.
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_every_runtime_computes_what_pytorch_computes(tmp_path: Path) -> None:
    done = node(TESTS / "all.mjs", cases=write_cases(tmp_path, FAMILIES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout
    assert "# skipped 0" in done.stdout


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """generate.mjs as a user has it: in a folder beside the packages that it needs."""
    folder = tmp_path_factory.mktemp("javascript")
    for module in (ROOT / "examples" / "javascript").glob("*.mjs"):
        shutil.copy(module, folder)
    (folder / "node_modules").symlink_to(MODULES)
    return folder / "generate.mjs"


def test_the_command_writes_what_prefixkit_writes(command: Path) -> None:
    folder = exported("llama").folder
    session = Session(folder, device="cpu")
    for flags, prefix in (((), OWN), (("--no-prefix",), None)):
        done = node(command, folder, "Blue Spice", "--max-new-tokens", "12", *flags)
        assert done.returncode == 0, done.stderr
        (expected,) = session.generate(["Blue Spice"], prefix, max_new_tokens=12)
        assert done.stdout == f"{expected.text}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected node generate.mjs FOLDER PROMPT"),
        (("{folder}", "text", "--prefix", "{folder}/none"), "none: expected a prefix file; found no such file"),
        (("{folder}", "text", "--prefix", "{folder}/onnx/model.onnx"), "not a prefix file?"),
        (
            ("{folder}", "text", "--prefix", "{other}/prefix.safetensors"),
            "use the backbone that the prefix was trained on",
        ),
        (("{folder}", "text " * 100), "shorten it"),
        (("/nowhere", "text"), "/nowhere/export.json: expected an exported folder"),
    ],
)
def test_the_command_refuses_in_one_line(command: Path, arguments: tuple[str, ...], said: str) -> None:
    places = {"folder": exported("llama").folder, "other": exported("gpt2").folder}
    done = node(command, *(argument.format(**places) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
