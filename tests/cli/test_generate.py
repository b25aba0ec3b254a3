"""`prefixkit generate` as a person runs it: pairing of prompts and prefixes, streaming, JSON, one line a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.prefix import save
from prefixkit.serving.session import Session
from tests.exported import backbone, exported, random_prefix


@pytest.fixture(scope="module")
def folder() -> Path:
    return exported("gpt2").folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefixes") / "other.safetensors"
    save(random_prefix(load_backbone(backbone("gpt2")).identity, seed=2, length=3), path)
    return path


def generate(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["generate", *map(str, arguments), "--device", "cpu"])
    out, err = capfd.readouterr()
    return code, out, err


def texts(capfd: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    code, out, err = generate(capfd, *arguments, "--max-new-tokens", 8, "--json")
    assert (code, err) == (0, "")
    return [completion["text"] for completion in json.loads(out)["completions"]]


def test_one_prompt_is_streamed_to_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = generate(capfd, folder, "--prompt", "Blue Spice", "--max-new-tokens", 8)
    expected = Session(folder, device="cpu").generate(["Blue Spice"], max_new_tokens=8)[0].text
    assert (code, out, err) == (0, f"{expected}\n", "")


def test_several_prompts_are_told_apart(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = generate(capfd, folder, "--prompt", "Blue Spice", "--prompt", "The Eagle", "--max-new-tokens", 8)
    both = texts(capfd, folder, "--prompt", "Blue Spice", "--prompt", "The Eagle")
    assert code == 0
    assert out == f"> Blue Spice\n{both[0]}\n\n> The Eagle\n{both[1]}\n\n"


def test_prefixes_are_paired_with_prompts(folder: Path, other: Path, capfd: pytest.CaptureFixture[str]) -> None:
    twice = ["--prompt", "Blue Spice", "--prompt", "Blue Spice"]
    own = texts(capfd, folder, *twice)
    paired = texts(capfd, folder, *twice, "--prefix", folder / "prefix.safetensors", "--prefix", other)
    shared = texts(capfd, folder, *twice, "--prefix", other)
    bare = texts(capfd, folder, *twice, "--no-prefix")
    assert own[0] == own[1] == paired[0]
    assert shared[0] == shared[1] == paired[1]
    assert bare[0] == bare[1]
    assert len({own[0], shared[0], bare[0]}) == 3


def test_json_is_whole(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = generate(capfd, folder, "--prompt", "Blue Spice", "--max-new-tokens", 3, "--json")
    document = json.loads(out)
    assert (code, document["version"], document["device"]) == (0, 1, "cpu")
    completion = document["completions"][0]
    assert set(completion) == {"prompt", "text", "token_ids", "finish", "prompt_tokens"}
    assert (completion["prompt"], completion["finish"]) == ("Blue Spice", "length")
    assert len(completion["token_ids"]) == 3


def test_what_a_model_writes_does_not_steer_the_terminal(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixkit.task.ModelTokenizer.decode", lambda self, ids: "a\x1b[2Jb\n🏽\u200d" * len(ids))
    code, out, _ = generate(capfd, folder, "--prompt", "x", "--max-new-tokens", 1)
    assert (code, out) == (0, "a\\x1b[2Jb\n🏽\u200d\n")


def test_seed_repeats_a_draw(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drawn = ["--prompt", "Blue Spice", "--temperature", "2", "--top-k", "50"]
    first, again, another = (texts(capfd, folder, *drawn, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != another


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-prefix", "--prefix", "x"], "--no-prefix: expected either this or --prefix; found both"),
        (["--prefix", "a", "--prefix", "b"], "--prefix: expected one, or one for each of the 1 prompts; found 2"),
        (["--prefix", "nowhere.safetensors"], "nowhere.safetensors: expected a safetensors file; found nothing"),
        (["--top-p", "0.5"], "--temperature: expected above 0 with --top-k, --top-p or --min-p"),
        (["--max-new-tokens", "5000"], "max_new_tokens: expected from 1 to "),
        (["--max-new-tokens", "0"], "max_new_tokens: expected from 1 to "),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = generate(capfd, folder, "--prompt", "Blue Spice", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"prefixkit: {message}")


def test_folder_without_a_report_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = generate(capfd, tmp_path, "--prompt", "x")
    assert code == 2
    assert err.endswith(
        "export.json: expected the report of an exported folder; found no such file; "
        "write one with `prefixkit export --onnx`\n"
    )


def test_command_imports_neither_torch_nor_transformers_nor_onnx(folder: Path) -> None:
    program = """
import sys
from prefixkit.cli import run
code = run(sys.argv[1:])
print([name for name in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir") if name in sys.modules])
sys.exit(code)
"""
    command = [sys.executable, "-c", program, "generate", str(folder), "--prompt", "x", "--max-new-tokens", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert ran.stdout.splitlines()[-1] == "[]"
