"""The API key, as whoever starts a server gives it."""

from __future__ import annotations

from prefixkit.errors import ConfigError


def read_key(given: str | None, where: str) -> str | None:
    """The key without the white space around it, such as the end of the line of a file; None where there is none.

    Raises:
        ConfigError: an empty key, or one that no header can carry.
    """
    if given is None:
        return None
    key = given.strip()
    if not key:
        raise ConfigError(where, expected="a key", found="an empty one", next_step="leave it out to go without")
    if not key.isprintable():
        raise ConfigError(where, expected="a key of printable characters", found="others")
    return key
