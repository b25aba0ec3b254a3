"""Templates with named fields, such as `Question: {question}\\nAnswer:`; `{{` and `}}` write a brace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import Formatter

from prefixkit.errors import ConfigError, DataError
from prefixkit.spelling import did_you_mean

SLOT_MARK = "\ufdd0slot\ufdd1"
"""A slot among the parts of a text: no character that a text can mean."""
SLOT = "slot"
"""The name in braces that marks a place for a prompt's vector, and is no field."""


def template_fields(template: str) -> tuple[str, ...]:
    """The names of the fields in `template`, in order, each once. Raises ConfigError on a malformed template."""
    return tuple(dict.fromkeys(name for _, name in _parts(template) if name is not None and name != SLOT))


def slots_in(template: str) -> int:
    """How many slots `template` marks. Raises ConfigError on a malformed template."""
    return sum(name == SLOT for _, name in _parts(template))


def fill(template: str, fields: Mapping[str, str], where: str) -> Iterator[tuple[str, bool]]:
    """The parts of `template` in order as `(text, is_literal)`: False marks a field's value, `SLOT_MARK` a slot.

    Raises DataError, placed at `where`, when a field is missing or is not one of the template's.
    """
    known = template_fields(template)
    for name in fields:
        if name not in known:
            raise DataError(
                where, expected=f"the fields {_listed(known)}", found=repr(name), next_step=did_you_mean(name, known)
            )
    missing = [name for name in known if name not in fields]
    if missing:
        raise DataError(where, expected=f"the field {missing[0]!r}", found=_listed(tuple(fields)) or "no field")
    for literal, field in _parts(template):
        yield literal, True
        if field == SLOT:
            yield SLOT_MARK, True
        elif field is not None:
            yield encodable(fields[field], where), False


def encodable(text: str, where: str) -> str:
    """`text`, or DataError where it holds half a surrogate pair, as undecodable bytes on a command line do."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(where, expected="Unicode text", found=f"{text[error.start]!r} in it") from error
    return text


def escape(literal: str) -> str:
    """`literal` as a template that stands for itself."""
    return literal.replace("{", "{{").replace("}", "}}")


def _parts(template: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise _malformed(template, str(error)) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise _malformed(template, f"the field {{{name}}}")
    return [(literal, name) for literal, name, _, _ in parsed]


def _malformed(template: str, found: str) -> ConfigError:
    return ConfigError(
        f"template {template!r}", expected="fields written {name}", found=found, next_step="write a brace as {{ or }}"
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
