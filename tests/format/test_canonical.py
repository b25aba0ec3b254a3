"""One spelling for each document, and no second reading of any."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from prefixkit.errors import FormatError
from prefixkit.format.canonical import canonical, canonical_hash, read_json, tagged

DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def test_the_spelling_is_exactly_this() -> None:
    document = {"b": [1, 1.0, 1e-7, 0.1, True, None], "a": {"ü": '\n"é\u2028'}, "B": -0.0}
    spelled = '{"B":-0.0,"a":{"ü":"\\n\\"é\u2028"},"b":[1,1.0,1e-07,0.1,true,null]}'
    assert canonical(document) == spelled.encode()


def test_the_order_of_keys_does_not_matter() -> None:
    assert canonical({"a": 1, "b": {"c": 2, "d": 3}}) == canonical({"b": {"d": 3, "c": 2}, "a": 1})


@given(DOCUMENTS)
def test_what_is_written_is_read_back_and_written_the_same(document: Any) -> None:
    written = canonical(document)
    assert canonical(read_json(written, "x")) == written
    assert json.loads(written) == document


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_that_json_lacks(number: float) -> None:
    with pytest.raises(FormatError, match="metrics: expected what JSON can hold"):
        canonical({"x": number}, "metrics")


def test_no_text_that_is_not_unicode() -> None:
    with pytest.raises(FormatError, match="not Unicode"):
        canonical("\ud800")


def test_hashes_are_tagged() -> None:
    assert canonical_hash({"a": 1}) == "b3-v1:" + blake3(b'{"a":1}').hexdigest() == tagged(b'{"a":1}')
