"""Reading a request's parameters: each with its type and range, and none that nobody reads."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from prefixkit.serving.http.errors import ApiError
from prefixkit.spelling import did_you_mean

HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
)
"""What says nothing of the answer, and is ignored."""

_LONG = 80
"""Characters of what a client sent that it is told again."""
_LARGEST = sys.float_info.max
"""JSON's whole numbers go on beyond it."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONG


class Parameters:
    """The parameters of one request. `null` is as if the parameter were not there."""

    def __init__(self, body: Mapping[str, Any], *, within: str = "") -> None:
        self._given = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set(HARMLESS)
        self._within = within

    def value(self, name: str) -> Any:
        """What was given, None without it."""
        self._known.add(name)
        return self._given.get(name)

    def text(self, name: str) -> str:
        """A string, which must be there."""
        value = self.value(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        return value

    def flag(self, name: str) -> bool:
        """True or False, which it is without it."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.value(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise self.wrong(name, f"an integer from {low} to {high}", value)
        return value

    def number(self, name: str, low: float, high: float = _LARGEST) -> float | None:
        """A finite number from `low` to `high`."""
        value = self.value(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            expected = f"a number from {low:g} to {high:g}" if high < _LARGEST else f"a number, {low:g} or more"
            raise self.wrong(name, expected, value)
        return float(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string or a list of at most `most` of them, none empty."""
        value = self.value(name)
        given = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(given, list) or len(given) > most or not all(isinstance(one, str) and one for one in given):
            raise self.wrong(name, f"a string or up to {most} of them, none empty", value)
        return tuple(given)

    def nested(self, name: str) -> Parameters:
        """The parameters inside an object."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return Parameters(value or {}, within=f"{name}.")

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse any value but those that ask for what is done anyway."""
        value = self.value(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in accepted):
            raise ApiError(
                400,
                f"{self._within}{name}: {_shown(value)} is not supported",
                param=f"{self._within}{name}",
                code="unsupported_parameter",
            )

    def finish(self) -> None:
        """Refuse what was not read: a parameter that is ignored would be a silent lie."""
        for name in self._given:
            if name not in self._known:
                param = f"{self._within}{name[:_LONG]}"
                step = did_you_mean(name[:_LONG], sorted(self._known - set(HARMLESS)))
                raise ApiError(400, f"{param}: no such parameter; {step}", param=param, code="unknown_parameter")

    def wrong(self, name: str, expected: str, value: Any) -> ApiError:
        """The error for a value that is not what was expected."""
        param = f"{self._within}{name}"
        return ApiError(400, f"{param}: expected {expected}; found {_shown(value)}", param=param)


def _shown(value: Any) -> str:
    return "nothing" if value is None else _SHORT.repr(value)
