"""The validator: every problem with its pointer, and the same verdict as the JSON Schema."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from prefixkit import __version__
from prefixkit.format.checks import Problem
from prefixkit.format.consistency import expected_shapes, tensor_problems
from prefixkit.format.manifest import document, parse
from prefixkit.format.validate import problems, structure
from prefixkit.format.writer import StoredTensor

CORPUS = Path(__file__).parent / "corpus"
SCHEMA = Draft202012Validator(
    json.loads((Path(__file__).parents[2] / "schemas" / "prefix-v1.schema.json").read_text(encoding="utf-8"))
)
GOOD = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((CORPUS / "good").iterdir())}
BAD = json.loads((CORPUS / "bad.json").read_text(encoding="utf-8"))
BEYOND = json.loads((CORPUS / "beyond.json").read_text(encoding="utf-8"))


def edited(case: dict[str, Any]) -> Any:
    """A good document with a case's defects."""
    made: Any = copy.deepcopy(GOOD[case["base"]])
    for pointer, value in case.get("set", {}).items():
        if pointer == "":
            made = value
        else:
            parent, key = parent_of(made, pointer)
            parent[key] = value
    for pointer in case.get("remove", []):
        parent, key = parent_of(made, pointer)
        del parent[key]
    return made


def parent_of(made: Any, pointer: str) -> tuple[Any, Any]:
    *path, last = pointer.split("/")[1:]
    for key in path:
        made = made[int(key)] if isinstance(made, list) else made[key]
    return made, int(last) if isinstance(made, list) else last


def test_the_schema_itself_is_sound() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_manifest_has_no_problem(name: str) -> None:
    SCHEMA.validate(GOOD[name])
    assert problems(GOOD[name]) == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_refused_by_both(name: str) -> None:
    made = edited(BAD[name])
    assert not SCHEMA.is_valid(made)
    assert sorted({problem.pointer for problem in problems(made)}) == BAD[name]["pointers"]


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_schema_cannot_say_the_validator_does(name: str) -> None:
    made = edited(BEYOND[name])
    SCHEMA.validate(made)
    assert sorted({problem.pointer for problem in problems(made)}) == BEYOND[name]["pointers"]


VALUES: list[Any] = [None, True, "", "x", 0, -1, 1.5, 2**53, [], [0], ["x", "x"], {}, {"x": 1}]


def mutants(made: Any) -> Iterator[Any]:
    """Each document that differs from `made` in one place: a value, a missing field or one too many."""
    for pointer in list(places(made)):
        for value in VALUES:
            mutant = copy.deepcopy(made)
            parent, key = parent_of(mutant, pointer)
            parent[key] = value
            yield mutant
        mutant = copy.deepcopy(made)
        parent, key = parent_of(mutant, pointer)
        del parent[key]
        yield mutant
        if isinstance(parent, dict):
            parent["unheard-of"] = 1
            yield mutant


def places(made: Any, pointer: str = "") -> Iterator[str]:
    inner = made.items() if isinstance(made, dict) else enumerate(made) if isinstance(made, list) else ()
    for key, value in inner:
        if "/" not in str(key):
            yield f"{pointer}/{key}"
            yield from places(value, f"{pointer}/{key}")


@pytest.mark.parametrize("name", GOOD)
def test_validator_and_schema_agree_on_every_single_change(name: str) -> None:
    for mutant in mutants(GOOD[name]):
        ours = list(structure(mutant))
        assert SCHEMA.is_valid(mutant) == (not ours), (mutant, ours)


@pytest.mark.parametrize("name", GOOD)
def test_records_and_documents_say_the_same(name: str) -> None:
    stored = GOOD[name]
    told = document(parse(stored))
    for optional in ("config", "metrics", "parents"):
        if optional not in stored["provenance"]:
            assert not told["provenance"].pop(optional)
    # JSON null is no value of a record; it is left out wherever it stands.
    assert told == without_null(stored)


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value


def test_a_future_version_says_what_to_upgrade() -> None:
    told = f"prefixkit {__version__} reads schema 1; this file is schema 2: upgrade prefixkit"
    assert problems({"schema": 2, "new": True}) == [Problem("/schema", told)]


def test_an_unknown_kind_says_what_to_upgrade() -> None:
    (problem,) = problems(edited(BAD["injection of an unknown kind"]))
    assert problem.message == f"prefixkit {__version__} does not know injections of kind 'lora': upgrade prefixkit"


def test_a_pointer_escapes_what_rfc_6901_says() -> None:
    made = copy.deepcopy(GOOD["key_value_prefix"])
    made["provenance"]["metrics"] = {"a/b~c": "x"}
    assert [problem.pointer for problem in problems(made)] == ["/provenance/metrics/a~1b~0c"]


def test_a_flood_of_problems_is_cut() -> None:
    made = copy.deepcopy(GOOD["key_value_prefix"])
    made["task"]["stop"] = [0] * 100_000
    assert len(problems(made)) == 1000


def sound_tensors(made: dict[str, Any]) -> dict[str, StoredTensor]:
    return {name: StoredTensor("F32", shape or (1,), b"") for name, (_, shape) in expected_shapes(made).items()}


@pytest.mark.parametrize("name", GOOD)
def test_tensors_as_the_manifest_says(name: str) -> None:
    assert tensor_problems(GOOD[name], sound_tensors(GOOD[name])) == []


def test_layers_may_differ_in_shape() -> None:
    shapes = expected_shapes(GOOD["encoder_decoder"])
    assert shapes["encoder.self.layers.1.key"] == ("/injections/1", (2, 3, 6))
    assert shapes["encoder.self.layers.1.value"] == ("/injections/1", (2, 3, 4))
    assert shapes["decoder.cross.layers.0.key"] == ("/injections/2", (2, 3, 4))


def test_the_shapes_of_the_other_kinds() -> None:
    assert expected_shapes(GOOD["embedding_prompt"]) == {"prompt.embeddings": ("/injections/0", (2, 8))}
    assert expected_shapes(GOOD["hidden_prompt"]) == {
        "encoder.layers.0.hidden": ("/injections/0", (4, 8)),
        "head.weight": ("/injections/1", (2, 8)),
        "head.bias": ("/injections/1", (2,)),
    }
    assert expected_shapes(GOOD["delta_and_head"]) == {
        "delta.encoder.layer.0.bias": ("/injections/0", None),
        "delta.ä/~b": ("/injections/0", None),
        "head.weight": ("/injections/1", (2, 8)),
        "head.bias": ("/injections/1", (2,)),
    }


def test_tensors_that_are_wrong_are_all_named() -> None:
    made = GOOD["key_value_prefix"]
    tensors = sound_tensors(made)
    del tensors["decoder.self.layers.0.key"]
    tensors["decoder.self.layers.2.key"] = tensors["decoder.self.layers.1.key"]
    tensors["decoder.self.layers.1.key"] = StoredTensor("F32", (3, 2, 4), b"")
    tensors["decoder.self.layers.1.value"] = StoredTensor("I8", (2, 3, 4), b"")
    assert [str(problem) for problem in tensor_problems(made, tensors)] == [
        "/injections: expected no tensor 'decoder.self.layers.2.key'; found one",
        "/injections/0: expected the tensor decoder.self.layers.0.key; found none",
        "/injections/0: expected decoder.self.layers.1.key of shape [2, 3, 4]; found [3, 2, 4]",
        "/injections/0: expected decoder.self.layers.1.value as F32 or F16 or BF16; found I8",
        "/injections: expected keys and values of one dtype; found F32 and I8",
    ]
