"""Two fixed templates for E2E records, which use no model: what a table of results must be read against."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def fields(record: str) -> dict[str, str]:
    """`name : Blue Spice | area : riverside` as a dictionary."""
    pairs = (part.split(" : ", 1) for part in record.split(" | "))
    return {key.strip(): value.strip() for key, value in pairs}


def one_template(record: str) -> str:
    """One sentence with the name, type, food, area and neighbour; price, rating and family are left out."""
    facts = fields(record)
    text = f"{facts['name']} is a {facts.get('Type', 'restaurant')}"
    text += f" serving {facts['food']} food" if "food" in facts else ""
    text += f" in the {facts['area']}" if "area" in facts else ""
    text += f" near {facts['near']}" if "near" in facts else ""
    return f"{text} ."


def two_sentences(record: str) -> str:
    """Every fact, in two sentences, in words that the references use often."""
    facts = fields(record)
    family = {"yes": "family friendly ", "no": ""}.get(facts.get("family friendly", ""), "")
    text = f"{facts['name']} is a {family}{facts.get('Type', 'restaurant')}"
    text += f" that serves {facts['food']} food" if "food" in facts else ""
    text += f" in the {facts['area']} area" if facts.get("area") == "riverside" else ""
    text += f" in the {facts['area']}" if facts.get("area") not in (None, "riverside") else ""
    text += f" near {facts['near']}" if "near" in facts else ""
    return f"{text} . {_second(facts)}".strip()


def _second(facts: Mapping[str, str]) -> str:
    told = []
    if "price" in facts:
        price = facts["price"]
        told.append(f"a {price} price range" if price in ("cheap", "moderate", "high") else f"a price range of {price}")
    if "customer rating" in facts:
        rating = facts["customer rating"]
        told.append(f"a customer rating of {rating}" if "out of" in rating else f"a {rating} customer rating")
    text = f"It has {' and '.join(told)} ." if told else ""
    return text + (" It is not family friendly ." if facts.get("family friendly") == "no" else "")


TEMPLATES: Mapping[str, Callable[[str], str]] = {"one-template": one_template, "two-sentences": two_sentences}
