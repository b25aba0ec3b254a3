"""What refusals say of a prefix, in the same words for every runtime."""

from __future__ import annotations

from prefixkit.format.manifest import Positions
from prefixkit.prefix import Prefix

RUNTIMES = "see `prefixkit runtimes`"
"""What to do next where nothing better is known: it says what each runtime takes."""
_PLACES = {
    None: "before the text",
    "prepend": "before the text",
    "after_first": "behind the first token of the text",
    "slots": "in slots of the text",
}


def of_whom(prefix: Prefix) -> str:
    """Which prefix it is: one in memory has no path, but a backbone."""
    return f"prefix for {prefix.manifest.backbone.name}"


def placed(placement: str | None) -> str:
    """Where something with this `placement` stands."""
    return _PLACES[placement]


def starting(positions: Positions | None) -> str:
    """Where text starts behind something with these `positions`."""
    if positions is None:
        return "no positions"
    free = "" if positions.prefix_takes_positions else ", as the prefix takes no positions"
    return f"text that starts at {positions.text_start}{free}"
