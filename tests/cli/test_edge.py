"""The edge: every error a line and an exit code, whatever was raised."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
import typer

from prefixkit import __version__, cli
from prefixkit.cli import run
from prefixkit.cli.printable import printable
from prefixkit.errors import DataError, ParityError, PrefixkitError
from tests.prefixes import GOLDEN


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (DataError("x.jsonl line 17", expected="JSON", found="{"), 2, "x.jsonl line 17: expected JSON; found {"),
        (
            ParityError("model.onnx", expected="at most 1e-4", found="0.5"),
            1,
            "model.onnx: expected at most 1e-4; found 0.5",
        ),
        (PrefixkitError("backbone", found="changed"), 1, "backbone: found changed"),
        (DataError("\x1b[31mred\nx"), 2, "\\x1b[31mred x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("a b"),
            1,
            "internal error: RuntimeError: a b; please report it at https://github.com/prefixkit/prefixkit/issues, "
            "with what PREFIXKIT_TRACEBACK=1 shows",
        ),
    ],
)
def test_an_error_is_one_line_and_a_code(
    raised: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(monkeypatch, raised)
    assert run(["fail"]) == code
    assert capsys.readouterr().err == f"prefixkit: {told}\n"


def test_ctrl_c_before_a_command_is_known_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    assert run(["fail"]) == 130
    assert capsys.readouterr().err == "prefixkit: interrupted\n"


def test_a_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, DataError("x"))
    monkeypatch.setenv("PREFIXKIT_TRACEBACK", "1")
    with pytest.raises(DataError):
        run(["fail"])


def use_command(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    """An application whose only commands are one that fails and one that does not."""
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    def fail() -> None:
        raise raised

    @app.command()
    def work() -> None:
        pass

    monkeypatch.setattr(cli, "app", app)


def test_done_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, DataError("x"))
    assert run(["work"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspct"], "No such command 'inspct'. Did you mean 'inspect'?; see `prefixkit --help`"),
        (["inspect"], "Missing argument 'prefix'; see `prefixkit inspect --help`"),
        (["inspect", "x", "--jsn"], "No such option: --jsn (Possible options: --json); see `prefixkit inspect --help`"),
    ],
)
def test_wrong_usage(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err == f"prefixkit: {told}\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"prefixkit {__version__}\n"


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {command}" in told for command in cli.COMMANDS)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        assert run([command, "--help"]) == 0
        assert f"Usage: prefixkit {command}" in capsys.readouterr().out


def test_a_closed_pipe_is_no_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    with pytest.raises(SystemExit) as caught:
        run(["fail"])
    assert caught.value.code == 1


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run `prefixkit` and a redirection in a shell."""
    program = f"{shlex.quote(sys.executable)} -c 'from prefixkit.cli import main; main()'"
    return subprocess.run(["sh", "-c", f"{program} {command}"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("option", ["", "--json"])
@pytest.mark.parametrize(
    ("redirection", "told"),
    [
        (">&-", "prefixkit: standard output: expected an open one; found it closed; to see nothing, use >/dev/null\n"),
        (
            ">/dev/full",
            "prefixkit: standard output: expected room for the result; found No space left on device\n",
        ),
    ],
)
def test_output_that_goes_nowhere_is_one_plain_line(option: str, redirection: str, told: str) -> None:
    done = shell(f"inspect {shlex.quote(str(GOLDEN))} {option} {redirection}")
    assert (done.returncode, done.stderr) == (1, told)


def test_a_reader_that_has_gone_ends_the_command_quietly() -> None:
    done = shell(f"inspect {shlex.quote(str(GOLDEN))} | true")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_standard_error_the_code_still_tells() -> None:
    done = shell("inspect nowhere.safetensors 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_text_that_would_steer_a_terminal_is_spelled_out() -> None:
    assert printable("é 中 \x1b[2J\x9b\u202e\ttab") == "é 中 \\x1b[2J\\x9b\\u202e\\ttab"
