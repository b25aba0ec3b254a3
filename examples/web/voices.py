"""What the page's prefixes learn to write about one restaurant's attributes, derived from the E2E data.

A `Voice` turns an E2E line, attributes and a sentence that a person wrote, into an example of a task of its own:
the sentence as it is, a verse, questions with answers, and, the other way round, a JSON record of the sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Facts = Mapping[str, str]

_OPENING = {
    "pub": "{name} is a pub, so come inside,\nits door is standing open wide.",
    "restaurant": "{name} is a restaurant, take your seat,\nno finer table in the street.",
    "coffee shop": "{name} is a coffee shop, dark and deep,\na place for those who need no sleep.",
    "": "{name} is a place where people dine,\nat six, at seven, or at nine.",
}
_COUPLETS = {
    ("food", "Chinese"): "The food is Chinese, sharp and sweet,\nand noodles warm your hands and feet.",
    ("food", "English"): "The food is English, pie and stew,\nthe kind of plate our grandmas knew.",
    ("food", "Fast food"): "The food is Fast food, chips and all,\nin boxes big and boxes small.",
    ("food", "French"): "The food is French, with wine and cheese,\nand bread as much as you may please.",
    ("food", "Indian"): "The food is Indian, red and gold,\nit keeps you warm when nights are cold.",
    ("food", "Italian"): "The food is Italian, oil and thyme,\na slice of lemon, sharp as rhyme.",
    ("food", "Japanese"): "The food is Japanese, fish on rice,\nthe knife was sharp, the cut precise.",
    ("area", "riverside"): "The riverside is at the door,\nand boats go by from shore to shore.",
    ("area", "city centre"): "The city centre hums all night,\nwith every window warm and bright.",
}
"""Each names its attribute in the input's own words before it goes on: so small a model copies well, and maps badly."""
_QUESTIONS = {
    "name": "What is it called? {}.",
    "Type": "What is it? A {}.",
    "food": "What do they cook? {}.",
    "price": "Is it dear? {}.",
    "customer rating": "Is it good? {}.",
    "area": "Where is it? {}.",
    "family friendly": "For children? {}.",
    "near": "What is near? {}.",
}
_SPOKEN = {"riverside": "By the river", "city centre": "In the city centre"}
_RECORD = ("name", "Type", "food", "area", "near")


def parse(attributes: str) -> dict[str, str]:
    """`name : Blue Spice | food : Italian` as a mapping."""
    return dict(pair.split(" : ", 1) for pair in attributes.split(" | "))


def plain(sentence: str) -> str:
    """A sentence of E2E, whose words and punctuation stand apart, as people write it."""
    text = re.sub(r" ([.,;:!?)])", r"\1", sentence.strip())
    text = re.sub(r" ('(?:s|re|ve|ll|t|m|d)\b)", r"\1", text.replace("( ", "("))
    return text.replace("£ ", "£").replace(" - ", "-").replace(" n't", "n't")


def verse(facts: Facts) -> str:
    """An opening that names the place, and a couplet each for its food and its area."""
    opening = _OPENING[facts.get("Type", "")].format(name=facts["name"])
    return "\n".join([opening, *(line for (key, value), line in _COUPLETS.items() if facts.get(key) == value)])


def questions(facts: Facts) -> str:
    """A question and an answer a line, in the order of the attributes."""
    return "\n".join(_QUESTIONS[key].format(_spoken(value)) for key, value in facts.items())


def record(facts: Facts, sentence: str) -> str:
    """As JSON what `sentence` says of name, type, food, area and neighbour, in words that can be found in it."""
    return json.dumps({key: facts[key] for key in _RECORD if _says(sentence, facts.get(key))}, ensure_ascii=False)


def says_all(facts: Facts, sentence: str) -> bool:
    """Whether `sentence` says of the place all that a record holds; many of E2E's leave something out."""
    return all(_says(sentence, facts.get(key)) for key in _RECORD if key in facts)


def _spoken(value: str) -> str:
    return _SPOKEN.get(value, value if value in _OPENING else plain(value[0].upper() + value[1:]))


def _says(sentence: str, value: str | None) -> bool:
    words = {"riverside": ("river",), "city centre": ("centre", "center")}.get(value or "", (value or "",))
    return value is not None and any(word.lower() in sentence.lower() for word in words)


@dataclass(frozen=True)
class Voice:
    """One prefix: its file, the name of its task, its training steps, and how an E2E line becomes `(input, target)`.

    Lines that it `wants` not are left out of its data.
    """

    file: str
    title: str
    steps: int
    example: Callable[[str, str], tuple[str, str]]
    wants: Callable[[Facts, str], bool] = lambda facts, sentence: True


VOICES = (
    Voice("sentence", "A restaurant in a sentence", 600, lambda facts, text: (facts, plain(text)), says_all),
    Voice("verse", "A restaurant in verse", 500, lambda facts, text: (facts, verse(parse(facts)))),
    Voice("questions", "A restaurant, question by question", 350, lambda facts, text: (facts, questions(parse(facts)))),
    Voice("record", "A sentence as a JSON record", 600, lambda facts, text: (plain(text), record(parse(facts), text))),
)
