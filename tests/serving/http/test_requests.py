"""From the body of a request to what the engine is asked: every parameter, and every one that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from prefixkit.serving.sampling import Sampling
from tests.serving.http.client import Client
from tests.serving.scripted_engine import ScriptedEngine

COMPLETIONS = "/v1/completions"
ASKED = {"model": "own", "prompt": "Blue Spice", "max_tokens": 2}


def test_parameters_reach_the_engine(client: Client, engine: ScriptedEngine) -> None:
    sampling = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3}
    status, _ = client.ask(COMPLETIONS, {**ASKED, **sampling, "stop": ["\n", "."], "logprobs": 2})
    assert status == 200
    (asked,) = engine.asked
    assert asked.sampling == Sampling(**sampling)
    assert (asked.prompt, asked.prefix, asked.max_new_tokens) == ("Blue Spice", "own", 2)
    assert (asked.stop, asked.logprobs) == (("\n", "."), 2)


def test_defaults_are_those_of_openai(client: Client, engine: ScriptedEngine) -> None:
    for _ in range(2):
        assert client.ask(COMPLETIONS, {"model": "own", "prompt": "x"})[0] == 200
    first, second = engine.asked
    assert first.sampling.temperature == 1
    assert first.sampling.seed != second.sampling.seed
    assert (first.max_new_tokens, first.stop, first.logprobs) == (None, (), None)


def test_the_likeliest_token_is_taken_whatever_else_would_be_left(client: Client, engine: ScriptedEngine) -> None:
    assert client.ask(COMPLETIONS, {**ASKED, "temperature": 0, "top_p": 1, "seed": -1})[0] == 200
    assert engine.asked[0].sampling == Sampling(seed=2**64 - 1)


def test_equal_prompts_are_drawn_apart(client: Client, engine: ScriptedEngine) -> None:
    assert client.ask(COMPLETIONS, {**ASKED, "prompt": ["x"] * 3, "seed": -1})[0] == 200
    assert [request.sampling.seed - 2**64 for request in engine.asked] == [-1, 0, 1]


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        ([[5], "a"], [(5,), "a"]),
    ],
)
def test_prompts_are_texts_or_token_ids(client: Client, engine: ScriptedEngine, prompt: Any, asked: list[Any]) -> None:
    status, document = client.ask(COMPLETIONS, {**ASKED, "prompt": prompt})
    assert status == 200
    assert [choice["index"] for choice in document["choices"]] == list(range(len(asked)))
    assert [request.prompt for request in engine.asked] == asked


def test_model_names_the_prefix(client: Client, engine: ScriptedEngine) -> None:
    bare = client.service.session.report.backbone.name
    for name in ("own", bare):
        assert client.ask(COMPLETIONS, {**ASKED, "model": name})[1]["model"] == name
    assert [request.prefix for request in engine.asked] == ["own", None]


def test_what_says_nothing_of_the_answer_is_ignored(client: Client) -> None:
    neutral = {"user": "me", "n": 1, "best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "stop": None}
    assert client.ask(COMPLETIONS, {**ASKED, **neutral, "presence_penalty": 0, "frequency_penalty": 0.0})[0] == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 2}, "n: 2 is not supported"),
        ({"n": True}, "n: True is not supported"),
        ({"best_of": 3}, "best_of: 3 is not supported"),
        ({"echo": True}, "echo: True is not supported"),
        ({"suffix": "x"}, "suffix: 'x' is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias: {'5': 1} is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty: 0.5 is not supported"),
        ({"max_token": 3}, "max_token: no such parameter; did you mean 'max_tokens'?"),
        ({"max_tokens": 0}, "max_tokens: expected an integer from 1 to 2147483647; found 0"),
        ({"max_tokens": True}, "max_tokens: expected an integer from 1 to 2147483647; found True"),
        ({"temperature": "1"}, "temperature: expected a number, 0 or more; found '1'"),
        ({"temperature": -1}, "temperature: expected a number, 0 or more; found -1"),
        ({"top_p": 0}, "top_p: expected a number above 0; found 0"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1; found 1.5"),
        ({"top_k": 0}, "top_k: expected an integer from 1 to 2147483647; found 0"),
        ({"min_p": 2}, "min_p: expected a number from 0 to 1; found 2"),
        ({"repetition_penalty": 1e-310}, "repetition_penalty: expected a number from 0.01 to 100; found 1e-310"),
        ({"repetition_penalty": 101}, "repetition_penalty: expected a number from 0.01 to 100; found 101"),
        ({"repetition_penalty": 10**400}, "repetition_penalty: expected a number from 0.01 to 100; found 1000"),
        ({"temperature": 10**400}, "temperature: expected a number, 0 or more; found 1000"),
        ({"seed": 0.5}, "seed: expected an integer from "),
        ({"stop": [""]}, "stop: expected a string or up to 16 of them, none empty; found ['']"),
        ({"stop": ["a"] * 17}, "stop: expected a string or up to 16 of them"),
        ({"logprobs": 21}, "logprobs: expected an integer from 0 to 20; found 21"),
        ({"stream": 1}, "stream: expected true or false; found 1"),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options: expected nothing without stream; found {'include_usage': True}",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation: True is not supported",
        ),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "stream_options.x: no such parameter; choose from include_obfuscation, include_usage",
        ),
        ({"stream": True, "stream_options": 3}, "stream_options: expected an object; found 3"),
        ({"prompt": None}, "prompt: expected a string, token ids below 320, or a list of either; found nothing"),
        ({"prompt": []}, "prompt: expected a string, token ids below "),
        ({"prompt": [[]]}, "prompt: expected a string, token ids below "),
        ({"prompt": [-1]}, "prompt: expected a string, token ids below "),
        ({"prompt": [320]}, "prompt: expected a string, token ids below "),
        ({"prompt": [True]}, "prompt: expected a string, token ids below "),
        ({"prompt": {"input": "x"}}, "prompt: expected a string, token ids below "),
        ({"prompt": ["x"] * 65}, "prompt: expected at most 64; found 65"),
        ({"model": None}, "model: expected a string; found nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: Client, engine: ScriptedEngine, change: dict[str, Any], message: str
) -> None:
    status, error = client.refusal(COMPLETIONS, {**ASKED, **change})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith(message)
    assert error["param"] == message.partition(":")[0]
    assert engine.asked == []


def test_an_unknown_model_is_not_found(client: Client) -> None:
    status, error = client.refusal(COMPLETIONS, {**ASKED, "model": "owm"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == "the model 'owm' does not exist; did you mean 'own'?"


def test_what_the_engine_refuses_is_refused(client: Client) -> None:
    status, error = client.refusal(COMPLETIONS, {**ASKED, "prompt": "refused", "stream": True})
    assert (status, error["message"]) == (400, "prompt: expected another")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON: "),
        (b"{", 400, "the body is not JSON: "),
        (b"\xff\xfe", 400, "the body is not JSON: "),
        (b"[" * 100_000, 400, "the body is not JSON: "),
        (b'{"temperature": NaN}', 400, "the body is not JSON: NaN is no JSON number"),
        (b'{"seed": ' + b"1" * 5000 + b"}", 400, "the body is not JSON: "),
        (b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "model: expected a string; found [[[[[[[...]]]]]]]"),
        (b'{"model": "own", "prompt": "x", "' + b"y" * 10**6 + b'": 1}', 400, "y" * 80 + ": no such parameter; "),
        (b"[]", 400, "the body: expected a JSON object; found list"),
        (b'{"model": "own", "prompt": "x", "temperature": 1e999}', 400, "temperature: expected a number, 0 or more"),
        (b'{"model": "\\ud800"}', 404, "the model "),
        (b'{"model": "own", "prompt": "x", "\\ud800": 1}', 400, "\ud800: no such parameter"),
    ],
)
def test_malformed_bodies_are_refused(client: Client, body: bytes, status: int, message: str) -> None:
    found, error = client.refusal(COMPLETIONS, body)
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert error["message"].startswith(message)


def test_bodies_are_json(client: Client) -> None:
    status, error = client.refusal(COMPLETIONS, ASKED, headers={"Content-Type": "text/plain"})
    assert (status, error["message"]) == (415, "Content-Type: expected application/json; found text/plain")


@pytest.mark.parametrize(("path", "body", "status"), [("/v1/nothing", None, 404), (COMPLETIONS, None, 405)])
def test_unknown_routes_are_told_in_the_same_shape(client: Client, path: str, body: Any, status: int) -> None:
    assert client.refusal(path, body)[0] == status
