"""What a server tells of itself: its models, its health, its metrics."""

from __future__ import annotations

from urllib.parse import quote

from tests.exported import LENGTH, TASK
from tests.serving.http.client import Client

ASKED = {"model": "own", "prompt": "Blue Spice", "max_tokens": 4}


def test_models_have_the_cards_of_their_prefixes(served: Client) -> None:
    report = served.service.session.report
    status, document = served.ask("/v1/models")
    assert (status, document["object"]) == (200, "list")
    own, bare = document["data"]
    assert isinstance(own.pop("created"), int)
    assert own == {
        "id": "own",
        "object": "model",
        "owned_by": "prefixkit",
        "task": TASK.name,
        "chat": False,
        "prefix": {"method": "random", "length": LENGTH, "content": report.prefix.content},
    }
    assert (bare["id"], bare["prefix"]) == (report.backbone.name, None)
    assert served.ask("/v1/models/own")[1]["prefix"] == own["prefix"]
    assert served.ask(f"/v1/models/{quote(bare['id'])}")[1] == bare
    status, error = served.refusal("/v1/models/nobody")
    assert (status, error["code"]) == (404, "model_not_found")


def test_health(served: Client) -> None:
    assert served.ask("/health") == (200, {"status": "ok", "reason": None})


def test_metrics_count_requests_and_tokens(client: Client) -> None:
    client.ask("/v1/completions", {**ASKED, "prompt": ["a", "b"]})
    client.ask("/v1/completions", {**ASKED, "model": "nobody"})
    client.ask("/v1/models/own")
    client.ask("/v1/wp-login.php")
    requests = "prefixkit_requests_total"
    assert client.metric(f'{requests}{{route="/v1/completions",status="200"}}') == 1
    assert client.metric(f'{requests}{{route="/v1/completions",status="404"}}') == 1
    assert client.metric(f'{requests}{{route="/v1/models/{{name}}",status="200"}}') == 1
    assert client.metric(f'{requests}{{route="other",status="404"}}') == 1
    assert client.metric("prefixkit_prompt_tokens_total") == 6
    assert client.metric("prefixkit_written_tokens_total") == 8
    assert client.metric("prefixkit_time_to_first_token_seconds_count") == 2
    assert client.metric("prefixkit_time_per_token_seconds_count") == 2
    assert client.metric("prefixkit_time_per_token_seconds_sum") > 0
    assert client.metric("prefixkit_prefixes") == 1
    assert client.metric("prefixkit_running_requests") == client.metric("prefixkit_waiting_requests") == 0
