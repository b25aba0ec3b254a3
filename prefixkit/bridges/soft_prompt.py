"""The vectors of a soft prompt, or the reason why a runtime cannot take it."""

from __future__ import annotations

from prefixkit.bridges.in_words import RUNTIMES, of_whom, placed, starting
from prefixkit.errors import FormatError
from prefixkit.format import names
from prefixkit.format.manifest import Positions
from prefixkit.prefix import Array, Prefix


def prompt_vectors(prefix: Prefix, runtime: str, *, stacks: tuple[str, ...] = ("decoder",)) -> Array:
    """The vectors [prefix, hidden] of `prefix`, for `runtime` (its title), after the model's embedding scale.

    Args:
        stacks: whose input the runtime can put them at.

    Raises:
        FormatError: something besides one prompt before the text, or text that does not start right behind it.
    """
    whose = " or ".join(f"{'an' if stack == 'encoder' else 'a'} {stack}" for stack in stacks)
    expected = f"a soft prompt before the text of {whose}, as {runtime} takes"
    records = prefix.manifest.injections
    record = records[0]
    if [one.kind for one in records] != ["embedding_prompt"]:
        found = " and ".join(dict.fromkeys(one.kind for one in records))
    elif record.stack not in stacks:
        found = f"one at the input of an {record.stack}"
    elif record.placement != "prepend":
        found = f"one {placed(record.placement)}"
    elif record.positions != Positions(text_start=record.length or 0):
        found = starting(record.positions)
    else:
        return prefix.tensors[names.PROMPT]
    raise FormatError(of_whom(prefix), expected=expected, found=found, next_step=RUNTIMES)
