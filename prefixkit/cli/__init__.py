"""The command line: one module a command, and the one place where errors become lines and exit codes.

A command's module is imported at every start, so it imports what is heavy inside its functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Annotated

import typer

from prefixkit import __version__
from prefixkit.cli import streams
from prefixkit.cli.printable import printable
from prefixkit.errors import InputError, PrefixkitError

COMMANDS = (
    *("quickstart", "train", "sweep", "self-study", "capture"),
    *("inspect", "export", "import", "generate", "serve", "eval", "label-words", "methods", "runtimes"),
    *("compose", "slice", "average", "cast", "diff"),
)
"""In the order of the help; each is a module of this package with `register(app)`, named with `_` for `-` and after
a Python keyword."""

_ISSUES = "https://github.com/prefixkit/prefixkit/issues"

app = typer.Typer(
    help="Train prefixes against frozen models, keep each in one file, serve it without PyTorch.",
    add_completion=False,
    # Plain help: rich would double the start-up time of every command.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in COMMANDS:
    _module = _command.replace("-", "_") + "_" * iskeyword(_command)
    import_module(f"prefixkit.cli.{_module}").register(app)


def main() -> None:
    """The `prefixkit` command."""
    if not streams.prepare():
        _tell("standard output: expected an open one; found it closed; to see nothing, use >/dev/null")
        sys.exit(1)
    code = run(sys.argv[1:])
    streams.settle()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 2 the input is at fault, 1 a fault of ours or of the
    output, 130 Ctrl-C.

    Errors are told in one line on standard error; `PREFIXKIT_TRACEBACK=1` shows where they come from.
    """
    try:
        # typer turns Ctrl-C into this exit code.
        code = app(args=list(arguments), prog_name="prefixkit", standalone_mode=False)
        if code == _INTERRUPTED:
            _tell("interrupted")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:  # before typer was there to turn it into a code
        _tell("interrupted")
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("PREFIXKIT_TRACEBACK") == "1":
            raise
        return _edge(error)


_INTERRUPTED = 130


def _edge(error: Exception) -> int:
    """Tell `error` in one line and return the exit code that it means."""
    if isinstance(error, PrefixkitError):
        _tell(str(error))
        return 2 if isinstance(error, InputError) else 1
    # typer brings its own copy of click, which its versions keep in different places: its errors are known by shape.
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error, err=True)
        return 2
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        command = getattr(getattr(error, "ctx", None), "command_path", "prefixkit")
        _tell(f"{error.format_message().rstrip('.')}; see `{command} --help`")
        return int(error.exit_code)
    if isinstance(error, BrokenPipeError):
        return 1
    if streams.is_output_failure(error):
        _tell(f"standard output: expected room for the result; found {getattr(error, 'strerror', error)}")
        return 1
    step = f"please report it at {_ISSUES}, with what PREFIXKIT_TRACEBACK=1 shows"
    _tell(f"internal error: {type(error).__name__}: {error}; {step}")
    return 1


def _tell(line: str) -> None:
    print(f"prefixkit: {printable(' '.join(line.split()))}", file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prefixkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def prefixkit(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
