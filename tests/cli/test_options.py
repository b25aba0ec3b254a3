"""The flags are a contract: this golden file changes only on purpose.

python -m tests.cli.test_options > tests/golden/options.json
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from prefixkit.cli import app

GOLDEN = Path(__file__).parent.parent / "golden" / "options.json"


def options() -> dict[str, list[str]]:
    """Every option and argument of every command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: sorted("/".join(parameter.opts) for parameter in command.params)
        for name, command in sorted(commands.items())
    }


def test_options_are_those_of_the_golden_file() -> None:
    assert options() == json.loads(GOLDEN.read_text())


def test_every_option_is_explained() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in commands.values():
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), (command.name, parameter.name)


if __name__ == "__main__":
    print(json.dumps(options(), indent=1))
