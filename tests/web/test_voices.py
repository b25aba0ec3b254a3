"""The prefixes of the page come from the data that their script derives."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.web.make_prefixes import PREFIXES, write_examples
from examples.web.voices import VOICES, Voice, parse, plain, questions, record, says_all, verse
from prefixkit.data.readers import data_hash, read_examples
from prefixkit.prefix import load
from prefixkit.quickstart import E2E

FACTS = parse("name : Blue Spice | Type : pub | food : Indian | price : less than £ 20 | area : riverside")
SAID = "Blue Spice , a pub by the river , is n't dear ( less than £ 20 ) . "


def test_a_sentence_is_written_as_people_write() -> None:
    assert plain(SAID) == "Blue Spice, a pub by the river, isn't dear (less than £20)."


def test_a_verse_has_a_couplet_for_what_the_place_is_cooks_and_stands_at() -> None:
    assert verse(FACTS).splitlines()[::2] == [
        "Blue Spice is a pub, so come inside,",
        "The food is Indian, red and gold,",
        "The riverside is at the door,",
    ]


def test_questions_have_answers() -> None:
    assert questions(FACTS).splitlines()[-2:] == ["Is it dear? Less than £20.", "Where is it? By the river."]


def test_a_record_holds_what_the_sentence_says() -> None:
    assert record(FACTS, SAID) == '{"name": "Blue Spice", "Type": "pub", "area": "riverside"}'


def test_sentences_that_leave_facts_out_are_known() -> None:
    assert not says_all(FACTS, SAID)
    assert says_all(FACTS, f"{SAID} It is Indian .")


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.file)
def test_the_prefix_was_trained_on_what_the_script_derives(voice: Voice, tmp_path: Path) -> None:
    manifest = load(PREFIXES / f"{voice.file}.safetensors").manifest
    write_examples(voice, E2E / "train.jsonl.gz", tmp_path / "train.jsonl")
    assert manifest.provenance.data_hash == data_hash(read_examples(tmp_path / "train.jsonl"))
    assert manifest.task is not None
    assert manifest.task.name == voice.title
    assert manifest.provenance.config["steps"] == voice.steps
