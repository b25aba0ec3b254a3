"""`prefixkit capture` from the outside: what it reads, what it says, one line for every mistake."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixkit.cli import run
from prefixkit.prefix import load

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]
CONTEXT = "name : blue spice | area : river\nblue spice is near the river .\n"


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.txt"
    path.write_bytes(CONTEXT.encode())
    return path


def asked(folder: Path, text: object, output: Path, *more: str) -> list[str]:
    return ["capture", "--backbone", str(folder), "--text", str(text), "-o", str(output), *more]


def test_says_what_it_wrote_and_what_is_next(
    backbone_folder: Folder, context: Path, tmp_path: Path, capfd: Out
) -> None:
    folder, output = backbone_folder("gpt2"), tmp_path / "p.safetensors"
    assert run(asked(folder, context, output)) == 0
    told = capfd.readouterr().out
    manifest = load(output).manifest
    assert f"wrote {output} ({manifest.injections[0].length} slots)" in told
    assert f"next: prefixkit export --onnx {output} --backbone {folder} -o served" in told
    assert str(tmp_path) not in str(manifest)
    assert run(["inspect", str(output), "--backbone", str(folder)]) == 0
    assert run(asked(folder, context, output, "--task", "text", "--json")) == 0
    described = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert described == {
        "version": 1,
        "output": str(output),
        "length": manifest.injections[0].length,
        "content": load(output).manifest.content,
    }
    assert load(output).manifest.task.separator == "\n"  # type: ignore[union-attr]


def test_standard_input_and_files_of_windows_are_the_same_text(
    backbone_folder: Folder, context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, windows = backbone_folder("gpt2"), tmp_path / "windows.txt"
    windows.write_bytes(b"\xef\xbb\xbf" + CONTEXT.replace("\n", "\r\n").encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(CONTEXT.encode())))
    for name, text in (("file", context), ("windows", windows), ("stdin", "-")):
        assert run(asked(folder, text, tmp_path / name)) == 0
    assert (tmp_path / "file").read_bytes() == (tmp_path / "windows").read_bytes()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "stdin").read_bytes()


def test_standard_input_without_text_is_one_line(
    backbone_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    for stream in (io.TextIOWrapper(io.BytesIO(b" \n")), None):
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(asked(backbone_folder("gpt2"), "-", tmp_path / "p")) == 2
        assert "standard input: expected some text; found none" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--text": "none.txt"}, "none.txt: expected a text file; found no such file; check the path"),
        ({"--text": "Answer briefly. " * 30}, "expected a text file; found file name too long; check the path"),
        ({"--text": "."}, "expected a text file; found is a directory; check the path"),
        ({"--text": "empty.txt"}, "empty.txt: expected some text; found none; write the text into it"),
        ({"--text": "latin.txt"}, "expected a text in UTF-8; found byte 0xe9 at 3; save it as text in UTF-8"),
        ({"--text": "long.txt"}, "long.txt: expected at most 126 tokens (a context of 128, 2 left for what follows)"),
        ({"-o": "context.txt"}, "expected a new file; found an input of this run; choose another name"),
        ({"-o": "."}, "expected the path of a file; found a folder; add a file name"),
        ({"-o": "none/p"}, "expected an existing folder"),
        ({"-o": "p" * 300}, "expected a file that can be written; found File name too long; choose another"),
        ({"--task": "chatt"}, "did you mean 'chat'?"),
        ({"--task": "chat"}, "expected a chat template; found none"),
        ({"--task": "task.toml"}, "task.toml: expected a task file; found no such file"),
        ({"--dtype": "int8"}, "dtype: expected float32, bfloat16, float16; found 'int8'"),
        ({"--backbone": "./nowhere"}, "./nowhere: expected a folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    changed: dict[str, str],
    told: str,
    backbone_folder: Folder,
    context: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Out,
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("river " * 300)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = {"--backbone": str(backbone_folder("gpt2")), "--text": "context.txt", "-o": "p", **changed}
    assert run(["capture", *(part for pair in given.items() for part in pair)]) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.startswith("prefixkit: ")
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_training_it_says_which_command_it_is(
    backbone_folder: Folder, records: Path, tmp_path: Path, capfd: Out
) -> None:
    given = ["train", "--method", "capture", "--backbone", str(backbone_folder("gpt2")), "--data", str(records)]
    assert run([*given, "-o", str(tmp_path / "p")]) == 2
    assert "found 'capture'; use `prefixkit capture`" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
