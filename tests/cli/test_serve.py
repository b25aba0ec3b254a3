"""`prefixkit serve` as a person runs it: a process that is asked over HTTP, and one line for each mistake."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.prefix import save
from prefixkit.serving.http.server import bound
from prefixkit.serving.session import Session
from tests.exported import backbone, exported, random_prefix

_SERVE = """
import sys
from prefixkit.cli import run
code = run(sys.argv[1:])
print([name for name in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir") if name in sys.modules])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return exported("gpt2", target="cuda").folder


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The command on a free port: the process, its address, and its first line."""
    command = [sys.executable, "-c", _SERVE, "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, "PYTHONUTF8": "1", **environment}, **pipes) as running:
        try:
            line = running.stdout.readline()
            yield running, line.rpartition(" ")[2].strip(), line
        finally:
            running.kill()


def ask(url: str, body: object = None, **headers: str) -> tuple[int, dict[str, object]]:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_process_serves_and_ends_well(folder: Path, tmp_path: Path) -> None:
    made = random_prefix(load_backbone(backbone("gpt2")).identity, seed=2, length=3)
    save(made, tmp_path / "other.safetensors")
    (tmp_path / "bad\x1b.safetensors").write_text("x")
    session = Session(exported("gpt2").folder, device="cpu", threads=1)
    session.add_prefix("other", made)
    with process(folder, "--prefixes", tmp_path, "--rows", 2, "--waiting", 1, "--threads", 1) as (running, url, line):
        assert line.startswith("serving own, gpt2-0, other on http://127.0.0.1:")
        assert running.stdout.readline().startswith(f"  curl {url}/v1/completions -H ")
        assert ask(f"{url}/health")[0] == 200
        for name in ("own", "other"):
            asked = {"model": name, "prompt": "Blue Spice", "max_tokens": 8, "temperature": 0}
            status, answer = ask(f"{url}/v1/completions", asked)
            expected = session.generate(["Blue Spice"], name, max_new_tokens=8)[0].text
            assert (status, answer["choices"][0]["text"]) == (200, expected)
        asked = {"model": "own", "prompt": ["x"] * 3, "max_tokens": 2}
        assert ask(f"{url}/v1/completions", asked)[0] == 200
        status, answer = ask(f"{url}/v1/completions", {**asked, "prompt": ["x"] * 4})
        assert (status, answer["error"]["message"]) == (400, "prompt: expected at most 3; found 4")
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=60)
    # A serving machine installs none of the heavy packages.
    assert (running.returncode, out) == (0, "[]\n")
    assert "bad\\x1b.safetensors is refused" in err
    assert "prefix other added" in err
    assert "Traceback" not in err


def test_more_connections_than_descriptors_are_survived(folder: Path) -> None:
    with process(folder, "--threads", 1) as (running, url, _):
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (128, 128))
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        opened = [socket.create_connection(address, timeout=30) for _ in range(300)]
        # The last is refused, so all have been looked at.
        assert opened[-1].recv(1) == b""
        for one in opened:
            one.close()
        assert ask(f"{url}/health")[0] == 200
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert "a connection is refused: 64 are open" in err
    assert "Traceback" not in err


def test_a_key_may_come_from_the_environment(folder: Path) -> None:
    with process(folder, "--threads", 1, PREFIXKIT_API_KEY="sesame") as (running, url, _):
        assert "Authorization: Bearer KEY" in running.stdout.readline()
        assert ask(f"{url}/v1/models")[0] == 401
        assert ask(f"{url}/v1/models", Authorization="Bearer sesame")[0] == 200
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "sesame" not in err


def test_an_open_address_without_a_key_is_warned_of(folder: Path) -> None:
    with process(folder, "--host", "0.0.0.0", "--threads", 1) as (running, _, _):
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert "whoever reaches this address may use the model: no --api-key is set" in err


def test_a_shared_prefix_takes_no_slots_of_a_row(folder: Path, tmp_path: Path) -> None:
    made = random_prefix(load_backbone(backbone("gpt2")).identity, seed=2, length=60)
    save(made, tmp_path / "long.safetensors")
    session = Session(exported("gpt2").folder, device="cpu", threads=1)
    session.add_prefix("long", made)
    options = ("--prefixes", tmp_path, "--threads", 1, "--capacity", 40, "--shared")
    with process(folder, *options, "long") as (_, url, _):
        asked = {"model": "long", "prompt": "Blue Spice", "max_tokens": 8, "temperature": 0}
        status, answer = ask(f"{url}/v1/completions", asked)
        expected = session.generate(["Blue Spice"], "long", max_new_tokens=8)[0].text
        assert (status, answer["choices"][0]["text"]) == (200, expected)
    with process(folder, *options, "lnog") as (running, _, _):
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert "--shared: no prefix is called 'lnog' so far, and each is copied" in err


def test_mistakes_are_one_line_and_exit_2(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with bound("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in [
            ([folder, "--prefixes", tmp_path / "none"], "--prefixes: expected a folder of prefix files; found "),
            ([folder, "--api-key", " "], "--api-key: expected a key; found an empty one"),
            ([folder, "--max-body", "0"], "--max-body: expected 1 byte or more; found 0"),
            ([folder, "--request-timeout", "-1"], "--request-timeout: expected more than 0 seconds; found -1"),
            ([folder, "--port", port], f"--host 127.0.0.1 --port {port}: expected an address to listen at; found "),
            ([tmp_path, "--port", "0"], f"{tmp_path}/export.json: expected the report of an exported folder"),
            ([exported("gpt2").folder, "--port", "0"], f"{exported('gpt2').folder}: expected graphs that write into"),
        ]:
            code = run(["serve", *map(str, arguments), "--device", "cpu"])
            out, err = capfd.readouterr()
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert err.startswith(f"prefixkit: {message}")


def test_a_folder_that_cannot_be_listed_is_told_at_once(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As whoever runs the tests may read everything.
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("prefixkit.cli.serve.os.scandir", refuse)
    assert run(["serve", str(folder), "--prefixes", str(tmp_path)]) == 2
    expected = f"--prefixes: expected a folder of prefix files; found {tmp_path}: Permission denied\n"
    assert capfd.readouterr().err == f"prefixkit: {expected}"


def test_a_missing_extra_is_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixkit.cli.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    assert run(["serve", str(folder)]) == 2
    err = capfd.readouterr().err
    assert err == "prefixkit: serve: expected the extra 'serve'; found no uvicorn; pip install 'prefixkit[serve]'\n"
