"""`/v1/completions` of a real model: OpenAI's format field by field, and the text that the model writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.prefix import save
from prefixkit.serving.engine import Engine
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.session import Session
from tests.exported import backbone, exported, random_prefix
from tests.serving.http.client import Client, eventually, serving

PATH = "/v1/completions"
ASKED = {"model": "own", "prompt": "Blue Spice", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def alone() -> Session:
    """The same folder without a server, to compare with."""
    return Session(exported("gpt2").folder, device="cpu", threads=1)


def test_every_field_of_an_answer(served: Client, alone: Session) -> None:
    before = int(time.time())
    status, document = served.ask(PATH, ASKED)
    (expected,) = alone.generate(["Blue Spice"], max_new_tokens=12)
    assert status == 200
    assert document.pop("id").startswith("cmpl-")
    assert before <= document.pop("created") <= time.time()
    written = len(expected.token_ids)
    assert document == {
        "object": "text_completion",
        "model": "own",
        "choices": [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": expected.finish}],
        "usage": {
            "prompt_tokens": expected.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": expected.prompt_tokens + written,
        },
    }


def test_a_stream_is_the_answer_in_pieces(served: Client) -> None:
    whole = served.ask(PATH, {**ASKED, "prompt": ["Blue Spice", "x"]})[1]
    asked = {**ASKED, "prompt": ["Blue Spice", "x"], "stream": True, "stream_options": {"include_usage": True}}
    *events, last = served.events(PATH, asked)
    for index, choice in enumerate(whole["choices"]):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    assert last["usage"] == whole["usage"]


def test_each_model_has_its_own_words(served: Client, alone: Session) -> None:
    bare = alone.report.backbone.name
    texts = {name: served.ask(PATH, {**ASKED, "model": name})[1]["choices"][0]["text"] for name in ("own", bare)}
    assert texts["own"] == alone.generate(["Blue Spice"], max_new_tokens=12)[0].text
    assert texts[bare] == alone.generate(["Blue Spice"], None, max_new_tokens=12)[0].text
    assert texts["own"] != texts[bare]


def test_a_drawn_answer_is_that_of_its_seed(served: Client, alone: Session) -> None:
    drawn = {**ASKED, "temperature": 1.5, "top_k": 50, "seed": 7}
    found = served.ask(PATH, drawn)[1]["choices"][0]["text"]
    sampling = Sampling(temperature=1.5, top_k=50, seed=7)
    assert found == alone.generate(["Blue Spice"], max_new_tokens=12, sampling=sampling)[0].text


def test_logprobs_of_every_token(served: Client) -> None:
    document = served.ask(PATH, {**ASKED, "logprobs": 2})[1]
    found = document["choices"][0]["logprobs"]
    count = document["usage"]["completion_tokens"]
    assert found.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in found.values()} == {count}
    assert "".join(found["tokens"]).strip() == document["choices"][0]["text"]
    for token, logprob, top, offset in zip(*found.values(), strict=True):
        # Greedy: what was written is the likeliest.
        assert max(top.values()) == top[token] == logprob < 0
        assert "".join(found["tokens"])[offset:].startswith(token)


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(served: Client) -> None:
    text = served.ask(PATH, ASKED)[1]["choices"][0]["text"]
    stop = text[2:6]
    choice = served.ask(PATH, {**ASKED, "stop": stop})[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text.partition(stop)[0].rstrip() != ""


def test_token_ids_are_taken_as_they_are(served: Client, alone: Session) -> None:
    ids = alone.tokenizer.encode_text("Blue Spice")
    document = served.ask(PATH, {**ASKED, "prompt": ids})[1]
    assert document["usage"]["prompt_tokens"] == len(ids)


def test_what_does_not_fit_is_refused(served: Client) -> None:
    status, error = served.refusal(PATH, {**ASKED, "max_tokens": 5000})
    assert (status, error["type"]) == (400, "invalid_request_error")
    status, error = served.refusal(PATH, {**ASKED, "prompt": "Blue Spice " * 500})
    assert (status, error["type"]) == (400, "invalid_request_error")
    status, error = served.refusal(PATH, b'{"model": "own", "prompt": "\\ud800"}')
    assert (status, error["message"][:29]) == (400, "prompt: expected Unicode text")


def test_many_clients_get_what_each_would_alone(served: Client, alone: Session) -> None:
    prompts = [f"name : {word}" for word in ("Eagle", "Mill", "River", "Blue", "Spice", "x")]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = threads.map(lambda prompt: served.ask(PATH, {**ASKED, "prompt": prompt})[1], prompts)
        found = [answer["choices"][0]["text"] for answer in answers]
    assert found == [alone.generate([prompt], max_new_tokens=12)[0].text for prompt in prompts]


@pytest.fixture
def changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr("prefixkit.serving.http.prefix_folder.SECONDS", 0.01)
    session = Session(exported("gpt2", target="cuda").folder, device="cpu", threads=1)
    with serving(Engine(session, rows=2), prefixes=tmp_path) as made:
        yield made


def test_a_prefix_is_replaced_while_the_model_serves(changing: Client, alone: Session, tmp_path: Path) -> None:
    for seed in (2, 3):
        made = random_prefix(load_backbone(backbone("gpt2")).identity, seed=seed, length=seed)
        content = save(made, tmp_path / "task.safetensors").manifest.content
        alone.add_prefix("task", made)
        expected = alone.generate(["Blue Spice"], "task", max_new_tokens=12)[0].text

        def current(content: str | None = content) -> bool:
            status, card = changing.ask("/v1/models/task")
            return status == 200 and card["prefix"]["content"] == content

        eventually(current)
        assert changing.ask(PATH, {**ASKED, "model": "task"})[1]["choices"][0]["text"] == expected


def test_hanging_up_frees_rows_of_the_real_engine(changing: Client) -> None:
    asked = {"model": "own", "prompt": ["x"] * 2, "temperature": 1, "stream": True, "max_tokens": 40}
    for _ in range(5):
        response = changing.send(PATH, asked)
        response.readline()
        response.close()
        changing.close()
    eventually(lambda: changing.service.worker.running == changing.service.worker.waiting == 0)
    assert changing.ask(PATH, ASKED)[0] == 200


def test_a_limit_beyond_the_context_is_named_as_it_was_given(served: Client) -> None:
    status, error = served.refusal("/v1/completions", {**ASKED, "max_tokens": 10**9})
    assert (status, error["param"]) == (400, "max_tokens")
    assert error["message"].startswith("max_tokens: expected from 1 to ")
    assert error["message"].endswith(" new tokens, which the context has left behind prompt; found 1000000000")
