"""The page of examples/web in headless Chromium, against what `prefixkit generate` writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

import prefixkit
from tests.web.browser import Page, chromium, served

UNSEEN = "name : Copper Kettle | Type : coffee shop | food : Japanese | price : high | area : riverside"
"""No line of the training data has this name."""
MOST = 160


@pytest.fixture(scope="module")
def session(site: Path) -> prefixkit.Session:
    """The model and the prefixes of the page in onnxruntime's Python package."""
    opened = prefixkit.Session(site / "model", device="cpu", threads=1)
    for path in (site / "prefixes").glob("*.safetensors"):
        opened.add_prefix(path.name, path)
    return opened


def _written(session: prefixkit.Session, prompt: str, prefix: str | None) -> str:
    return session.generate([prompt], prefix, max_new_tokens=MOST)[0].text


@pytest.fixture(scope="module")
def texts(page: Page) -> dict[str, list[str]]:
    """The states of the text for one input, with each prefix that describes a restaurant and with none."""
    found = {}
    for file in ("sentence.safetensors", "verse.safetensors", "questions.safetensors", ""):
        page.choose(file)
        found[file] = page.write(UNSEEN)
    return found


def test_every_prefix_writes_what_prefixkit_writes_with_it(
    texts: dict[str, list[str]], session: prefixkit.Session
) -> None:
    for file, states in texts.items():
        expected = _written(session, UNSEEN, None if file == "" else file)
        assert states[-1] == expected, file


def test_every_prefix_writes_its_own_kind_of_text(texts: dict[str, list[str]]) -> None:
    sentence, verse, questions, bare = (states[-1] for states in texts.values())
    assert "Copper Kettle" in sentence
    assert "\n" not in sentence
    assert verse.startswith("Copper Kettle is a coffee shop, dark and deep,\n")
    assert "the knife was sharp, the cut precise." in verse
    assert questions.startswith("What is it called? Copper Kettle.\n")
    assert questions.count("?") == 5
    assert "Copper Kettle is" not in bare


def test_a_sentence_becomes_a_record(page: Page) -> None:
    page.choose("record.safetensors")
    text = page.write("Copper Kettle is a coffee shop in the city centre.")[-1]
    assert json.loads(text)["name"] == "Copper Kettle"


def test_text_comes_in_pieces(texts: dict[str, list[str]]) -> None:
    for states in texts.values():
        whole = states[-1]
        parts = [state for state in states if state]
        assert len(parts) > 5
        assert all(whole.startswith(part) for part in parts)


def test_the_model_is_loaded_once(page: Page, texts: dict[str, list[str]]) -> None:
    assert texts
    assert [path for path in page.asked if ".onnx" in path] == ["/model/onnx/model.onnx"]
    assert sum(path.endswith(".wasm") for path in page.asked) == 1
    assert len(page.asked) == len(set(page.asked)), "something was fetched twice"


def test_the_card_is_what_the_file_says(page: Page, site: Path) -> None:
    manifest = prefixkit.load(site / "prefixes" / "verse.safetensors").manifest
    page.choose("verse.safetensors")
    said = page.text("card")
    assert manifest.task is not None
    assert page.text("title") == manifest.task.name
    for fact in (manifest.provenance.method, str(manifest.backbone.weights_hash)[7:19], str(manifest.content)[7:19]):
        assert fact in said


def test_a_prefix_that_is_dropped_writes(page: Page, site: Path, session: prefixkit.Session, tmp_path: Path) -> None:
    prefix = prefixkit.load(site / "prefixes" / "questions.safetensors")
    prefixkit.save(replace(prefix, manifest=_named(prefix, "Mine")), tmp_path / "mine.safetensors")
    page.choose("verse.safetensors")
    states = page.drop("mine.safetensors", (tmp_path / "mine.safetensors").read_bytes())
    assert page.text("title") == "Mine"
    prompt = page.driver.execute_script("return document.getElementById('prompt').value")
    assert states[-1] == _written(session, prompt, "questions.safetensors")


def _named(prefix: prefixkit.Prefix, name: str) -> prefixkit.Manifest:
    assert prefix.manifest.task is not None
    return replace(prefix.manifest, task=replace(prefix.manifest.task, name=name), content=None)


def test_a_prefix_for_other_weights_is_refused_and_the_page_goes_on(page: Page, site: Path, tmp_path: Path) -> None:
    ours = prefixkit.load(site / "prefixes" / "verse.safetensors")
    other = f"b3t-v1:{'0123456789abcdef' * 4}"
    manifest = replace(ours.manifest, backbone=replace(ours.manifest.backbone, weights_hash=other), content=None)
    prefixkit.save(replace(ours, manifest=manifest), tmp_path / "other.safetensors")
    before = _choices(page)
    refusal = page.drop_refused("other.safetensors", (tmp_path / "other.safetensors").read_bytes())
    mine = str(ours.manifest.backbone.weights_hash)[7:19]
    assert refusal == (
        f"other.safetensors was not taken: it was made for gpt2-8m, whose weights have the hash {other[7:19]}…; "
        f"this page has gpt2-8m, {mine}…"
    )
    assert _choices(page) == before
    assert page.choose("sentence.safetensors")[-1]
    assert page.text("problem") == ""


@pytest.mark.parametrize("level", ["config", "tokenizer"])
def test_another_configuration_or_tokenizer_is_refused(page: Page, site: Path, tmp_path: Path, level: str) -> None:
    ours = prefixkit.load(site / "prefixes" / "verse.safetensors")
    changed: dict[str, Any] = {f"{level}_hash": f"b3-v1:{'0' * 64}"}
    manifest = replace(ours.manifest, backbone=replace(ours.manifest.backbone, **changed), content=None)
    prefixkit.save(replace(ours, manifest=manifest), tmp_path / "other.safetensors")
    refusal = page.drop_refused("other.safetensors", (tmp_path / "other.safetensors").read_bytes())
    assert f"{level} hash b3-v1:{'0' * 64}" in refusal


def test_damaged_and_other_files_are_refused(page: Page, site: Path) -> None:
    sound = (site / "prefixes" / "verse.safetensors").read_bytes()
    flipped = sound[:-1000] + bytes([sound[-1000] ^ 1]) + sound[-999:]
    for name, data, reason in (
        ("cut.safetensors", sound[:-4], "truncated"),
        ("flipped.safetensors", flipped, "content"),
        ("notes.txt", b"Buy milk, bread and butter.", "header"),
        ("empty.safetensors", b"", "8 bytes"),
    ):
        refusal = page.drop_refused(name, data)
        assert refusal.startswith(f"{name} was not taken: ")
        assert reason in refusal
    assert not any("cut" in choice for choice in _choices(page))


def test_a_file_without_provenance_does_not_join(page: Page, site: Path) -> None:
    before = _choices(page)
    refusal = page.drop_refused("edited.safetensors", _with_manifest(site, provenance=None))
    assert "expected a provenance with method; found nothing" in refusal
    assert _choices(page) == before


def test_a_prefix_for_unknown_weights_says_so(page: Page, site: Path, tmp_path: Path) -> None:
    ours = prefixkit.load(site / "prefixes" / "verse.safetensors")
    manifest = replace(ours.manifest, backbone=replace(ours.manifest.backbone, weights_hash=None), content=None)
    prefixkit.save(replace(ours, manifest=manifest), tmp_path / "loose.safetensors")
    assert page.drop("loose.safetensors", (tmp_path / "loose.safetensors").read_bytes())[-1]
    assert any(one.startswith("loose.safetensors: ") and one.endswith(", weights unknown") for one in _choices(page))
    assert "unknown" in page.text("card")


def test_a_file_of_a_name_that_is_taken_gets_another(page: Page, site: Path, session: prefixkit.Session) -> None:
    data = (site / "prefixes" / "questions.safetensors").read_bytes()
    for name in ("verse (2).safetensors", "verse (3).safetensors"):
        page.drop("verse.safetensors", data)
        assert page.text("says") == name
        assert any(one.startswith(f"{name}: ") for one in _choices(page))
    page.choose("verse.safetensors")
    assert page.write(UNSEEN)[-1] == _written(session, UNSEEN, "verse.safetensors")


def test_a_file_that_is_dropped_before_the_model_is_there_waits_for_it(site: Path) -> None:
    data = (site / "prefixes" / "questions.safetensors").read_bytes()
    with served(site) as (address, asked), chromium() as driver:
        early = Page(driver, asked)
        early.drop_at_once("early.safetensors", data, address)
        assert early.text("problem") == ""
        assert any(one.startswith("early.safetensors: ") for one in _choices(early))


def _with_manifest(site: Path, **changes: Any) -> bytes:
    """A prefix of the page with another manifest."""
    data = (site / "prefixes" / "verse.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = {**json.loads(header["__metadata__"]["prefixkit"]), **changes}
    header["__metadata__"]["prefixkit"] = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_stop_ends_a_text(page: Page) -> None:
    page.choose("")
    whole = page.write("name : The Mill")
    press = "new MutationObserver((_, observer) => { observer.disconnect(); document.getElementById('stop').click(); })"
    press += ".observe(text, { childList: true });document.getElementById('write').click();"
    stopped = page.watch(press)
    assert len(stopped[-1]) < len(whole[-1])
    assert whole[-1].startswith(stopped[-1])


def test_an_input_without_text_and_one_too_long_are_told(page: Page) -> None:
    page.choose("sentence.safetensors")
    assert page.told(" ") == "There is no input: write some, or take an example."
    assert "shorten it" in page.told("food : Italian | " * 200)
    assert page.write(UNSEEN)[-1]


def test_a_prefix_is_chosen_and_opened_by_keyboard(page: Page, site: Path) -> None:
    page.choose("verse.safetensors")
    radio = page.driver.find_element("css selector", "#choices input:checked")
    page.driver.execute_script("arguments[0].focus()", radio)
    radio.send_keys(Keys.ARROW_RIGHT)
    assert page.title_becomes("A restaurant, question by question")
    page.driver.find_element("id", "file").send_keys(str(site / "prefixes" / "record.safetensors"))
    assert page.title_becomes("A sentence as a JSON record")


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_its_window(page: Page, width: int) -> None:
    page.resize(width)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_nothing_went_wrong_in_the_console(page: Page, texts: dict[str, list[str]]) -> None:
    assert texts
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def _choices(page: Page) -> list[str]:
    return page.text("choices").splitlines()
