"""Precision, recall and F1 of whole entities, as conlleval (Tjong Kim Sang & Buchholz 2000) and seqeval count them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefixkit.errors import DataError

Entity = tuple[int, int, str]
"""The first word, the one behind the last, and the type."""


def tagging_scores(chosen: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1`, `precision` and `recall` of entities, and `accuracy` of single tags, all 0 to 100.

    Tags are `O`, or `B-` and `I-` and a type, with `E-` and `S-` where ends and single words are marked; an `I-` that
    continues nothing of its type begins an entity. Any other tag is an entity of one word. Without an entity to find
    the F1 is 0.

    Raises DataError when there is nothing to score.
    """
    if not chosen or [len(tags) for tags in chosen] != [len(tags) for tags in right]:
        raise DataError("evaluation", expected="a tag for every word", found=f"{len(chosen)} for {len(right)} examples")
    found = {(row, entity) for row, tags in enumerate(chosen) for entity in entities(tags)}
    wanted = {(row, entity) for row, tags in enumerate(right) for entity in entities(tags)}
    both = len(found & wanted)
    pairs = [one == other for row in zip(chosen, right, strict=True) for one, other in zip(*row, strict=True)]
    return {
        "f1": _percent(2 * both, len(found) + len(wanted)),
        "precision": _percent(both, len(found)),
        "recall": _percent(both, len(wanted)),
        "accuracy": _percent(sum(pairs), len(pairs)),
    }


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities that `tags` mark, in order."""
    begin, kind, before = 0, "", "O"
    for index, tag in enumerate([*tags, "O"]):
        prefix, own = _parts(tag)
        goes_on = prefix in ("I", "E") and before in ("B", "I") and own == kind
        if kind and not goes_on:
            yield begin, index, kind
        if not goes_on:
            begin, kind = index, own
        before = prefix


def _parts(tag: str) -> tuple[str, str]:
    """What a tag says of its word's place, and the type, which has no name in `B` and `I` alone."""
    place, dash, kind = tag.partition("-")
    if dash:
        return place, kind
    return ("O", "") if tag == "O" else (tag, "_" if tag in ("B", "I", "E", "S") else tag)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
