"""The application of Ray Serve on a local Ray.

Not in the daily run: Ray and what it brings (the extra `ray`) are 50 packages of 370 MB, and a cluster takes a quarter
of a minute to come and go.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.prefix import save
from prefixkit.serving.http.server import bound
from prefixkit.serving.session import Session
from tests.exported import backbone, exported, random_prefix

pytestmark = pytest.mark.matrix

_CLUSTER = """
import json, sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import ray
from ray import serve

from prefixkit.bridges.ray_serve import app

arguments, port, asked = json.loads(sys.argv[1])
heavy = [name for name in ("torch", "transformers", "onnx", "onnxscript") if name in sys.modules]


def ask(body, key="sesame"):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": port})
serve.run(app(arguments))
(deployment,) = serve.status().applications["default"].deployments.values()
found = {
    "heavy": heavy,
    "replicas": deployment.replica_states["RUNNING"],
    "answers": [ask(body) for body in asked for _ in range(4)],
    "streamed": ask({**asked[0], "stream": True}),
    "refused": ask(asked[0], key="other")[0],
}
serve.shutdown()
ray.shutdown()
print(json.dumps(found))
"""


def python(script: str, argument: object, home: Path) -> str:
    environment = {**os.environ, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", script, json.dumps(argument)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_replicas_write_what_a_session_writes(tmp_path: Path) -> None:
    prefixes = tmp_path / "prefixes"
    prefixes.mkdir()
    made = random_prefix(load_backbone(backbone("gpt2")).identity, seed=2, length=3)
    save(made, prefixes / "other.safetensors")
    session = Session(exported("gpt2").folder, device="cpu", threads=1)
    session.add_prefix("other", made)
    names = ["own", "other"]
    asked = [{"model": name, "prompt": "Blue Spice", "max_tokens": 8, "temperature": 0} for name in names]
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    arguments = {"folder": str(exported("gpt2", target="cuda").folder), "prefixes": str(prefixes), "rows": "2"}
    # As a command line gives them: texts.
    arguments |= {"device": "cpu", "threads": "1", "api_key": "sesame", "num_replicas": "2"}
    found = json.loads(python(_CLUSTER, [arguments, port, asked], tmp_path).splitlines()[-1])

    expected = [session.generate(["Blue Spice"], name, max_new_tokens=8)[0].text for name in names]
    assert expected[0] != expected[1]
    answers = [(status, json.loads(body)["choices"][0]["text"]) for status, body in found["answers"]]
    assert answers == [(200, text) for text in expected for _ in range(4)]
    status, events = found["streamed"]
    pieces = [json.loads(line.removeprefix("data: ")) for line in events.split("\n\n")[:-2]]
    assert (status, "".join(piece["choices"][0]["text"] for piece in pieces)) == (200, expected[0])
    assert events.endswith("data: [DONE]\n\n")
    assert (found["refused"], found["replicas"], found["heavy"]) == (401, 2, [])


_MISTAKES = """
import json, sys
from prefixkit.bridges.ray_serve import app
from prefixkit.errors import ConfigError

for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except ConfigError as error:
        print(error)
"""


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    given = [{"folder": "x", "row": 2}, {}, {"folder": "x", "rows": "two"}, {"folder": "x", "api_key": ""}]
    told = python(_MISTAKES, given, tmp_path)
    assert told.splitlines() == [
        "app: expected a known argument; found 'row'; did you mean 'rows'?",
        "app: expected folder=…, as `prefixkit export --onnx` wrote it; found none",
        "app rows: expected a number; found 'two'",
        "app api_key: expected a key; found an empty one; leave it out to go without",
    ]


_OPTIONS = """
import json
from types import SimpleNamespace

from prefixkit.bridges.ray_serve import Replica, replicated

options = {"autoscaling_config": {"max_replicas": 8}, "ray_actor_options": {"num_cpus": 2}}
deployment = replicated("x", rows=4, waiting=6, num_gpus=1, options=options)._bound_deployment
scaling = deployment._deployment_config.autoscaling_config
found = [deployment.max_ongoing_requests, deployment.max_queued_requests]
found += [deployment.ray_actor_options["num_gpus"], deployment.ray_actor_options["num_cpus"]]
found += [scaling.max_replicas, scaling.target_ongoing_requests]
scaling = replicated("x", rows=4, num_replicas="auto")._bound_deployment._deployment_config.autoscaling_config
found += [scaling.target_ongoing_requests]

replica = Replica()
for health in (("ok", None), ("draining", "it stops"), ("failed", "no memory")):
    replica.app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(health=health)))
    try:
        replica.check_health()
        found.append(None)
    except RuntimeError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_a_replica_has_as_many_requests_as_its_engine_takes_and_is_replaced_when_that_fails(tmp_path: Path) -> None:
    found = json.loads(python(_OPTIONS, None, tmp_path))
    assert found == [10, 6, 1, 2, 8, 4, 4, None, None, "no memory"]
