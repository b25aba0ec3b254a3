"""`prefixkit generate`: text from an exported folder, by onnxruntime alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    from prefixkit.serving.generation import Completion
    from prefixkit.serving.session import Session

JSON_VERSION = 1

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What could steer a terminal is shown, not sent; a model writes what it likes."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("generate", no_args_is_help=True)(generate)


def generate(
    folder: Annotated[Path, typer.Argument(help="A folder that `prefixkit export --onnx` wrote.")],
    prompt: Annotated[
        list[str], typer.Option(help="An input of the task; JSON where it has several fields. Repeatable.")
    ],
    prefix: Annotated[
        list[Path] | None, typer.Option(help="Another prefix: one for all prompts, or one for each.")
    ] = None,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="The bare model, asked as the task asks.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to write, at most. [128]")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, one is drawn.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that hold P of the probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens with P of the likeliest one's probability.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 disfavours what was said already.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Prompt number I draws with seed + I.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    allow_mismatch: Annotated[bool, typer.Option("--allow-mismatch", help="Take prefixes for other weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write what the exported model says to each prompt, with its prefix, with others or with none."""
    from prefixkit.serving.sampling import Sampling
    from prefixkit.serving.session import Session

    if prefix and no_prefix:
        raise ConfigError("--no-prefix", expected="either this or --prefix", found="both")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    session = Session(folder, device=device)  # type: ignore[arg-type]
    if session.device == "cpu" and device == "auto":
        typer.echo("onnxruntime found no GPU that it can use: running on the CPU", err=True)
    names = _names(session, prefix or [], no_prefix, len(prompt), allow_mismatch)
    streamed = len(prompt) == 1 and not as_json
    completions = session.generate(
        prompt,
        names,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        on_piece=lambda piece: _write(piece.text) if streamed else None,
    )
    if as_json:
        typer.echo(json.dumps(_document(session, prompt, completions), ensure_ascii=False))
    elif streamed:
        _write("\n")
    else:
        _show(prompt, completions)


def _names(
    session: Session, paths: Sequence[Path], no_prefix: bool, prompts: int, allow_mismatch: bool
) -> Sequence[str | None]:
    from prefixkit.serving.session import OWN

    if no_prefix or not paths:
        return [None if no_prefix else OWN] * prompts
    if len(paths) not in (1, prompts):
        expected = f"one, or one for each of the {prompts} prompts"
        raise ConfigError("--prefix", expected=expected, found=f"{len(paths)}")
    for path in dict.fromkeys(paths):
        session.add_prefix(str(path), path, allow_mismatch=allow_mismatch)
    return [str(path) for path in paths] * (prompts if len(paths) == 1 else 1)


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_CONTROLS))
    sys.stdout.flush()


def _show(prompts: Sequence[str], completions: Sequence[Completion]) -> None:
    for prompt, completion in zip(prompts, completions, strict=True):
        _write(f"> {prompt}\n{completion.text}\n\n")


def _document(session: Session, prompts: Sequence[str], completions: Sequence[Completion]) -> dict[str, Any]:
    return {
        "version": JSON_VERSION,
        "device": session.device,
        "completions": [
            {**vars(completion), "prompt": prompt, "token_ids": list(completion.token_ids)}
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
    }
