from __future__ import annotations

from prefixkit.data.readers import Example
from prefixkit.data.references import ReferenceGroup, group_references


def test_references_meet_in_order_of_first_occurrence() -> None:
    examples = [
        Example({"input": "x"}, "1", "d:1"),
        Example({"input": "y"}, "2", "d:2"),
        Example({"input": "x"}, "3", "d:3"),
        Example({"input": "x"}, "1", "d:4"),
    ]
    assert group_references(examples) == [
        ReferenceGroup({"input": "x"}, ("1", "3", "1"), "d:1"),
        ReferenceGroup({"input": "y"}, ("2",), "d:2"),
    ]


def test_conversations_are_inputs_too() -> None:
    said = {"messages": [{"role": "user", "content": "Hi"}]}
    groups = group_references([Example(said, "a"), Example({"input": "Hi"}, "b"), Example(said, "c")])
    assert [group.references for group in groups] == [("a", "c"), ("b",)]
