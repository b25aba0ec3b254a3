"""Contenders in turn, round after round, and what their ratios were: a busy machine slows the whole round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

Turns = Mapping[str, Callable[[int], float]]
"""By contender: a turn of the round with this number, and what it measured."""


@dataclass(frozen=True)
class Row:
    """One comparison, as `--json` writes it.

    Attributes:
        ours, peer: medians over rounds.
        ratio: the median over rounds of ours / peer.
        spread: the least and the greatest of those ratios.
    """

    case: str
    metric: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    spread: tuple[float, float]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def alternate(turns: Turns, rounds: int) -> dict[str, list[float]]:
    """Every contender once a round; who begins changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(turns[name](number))
    return found


def compare(case: str, metric: str, found: Mapping[str, Sequence[float]], ours: str = "ours") -> list[Row]:
    """Ours against every peer, round by round."""
    return [row(case, metric, found[ours], values, name) for name, values in found.items() if name != ours]


def row(case: str, metric: str, ours: Sequence[float], peer: Sequence[float], name: str) -> Row:
    """Ours against the peer of that `name`, round by round."""
    ratios = [one / other for one, other in zip(ours, peer, strict=True)]
    return Row(case, metric, median(ours), median(peer), name, median(ratios), (min(ratios), max(ratios)))


def table(rows: Iterable[Row]) -> str:
    """`rows` in Markdown."""
    lines = [
        "| case | measure | ours | peer | | ours / peer | least to greatest |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for one in rows:
        values = f"{_short(one.ours)} | {_short(one.peer)} | {one.peer_name}"
        low, high = one.spread
        lines.append(f"| {one.case} | {one.metric} | {values} | {one.ratio:.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
