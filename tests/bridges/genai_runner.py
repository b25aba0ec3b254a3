"""Runs onnxruntime-genai in an environment of its own: `python genai_runner.py FOLDER < requests.json > answers.json`.

A request is `{"rows": [[id, …], …], "adapter": name or null, "steps": n, "after": ids or null}`; its answer has the
tokens [rows, steps], the logits of each row's prompt and of every step. With `after`, the text is rewound to its first
two tokens before that, and goes on with those ids.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as og


def answer(model: og.Model, adapters: og.Adapters, pad: int, request: dict[str, Any]) -> dict[str, Any]:
    rows = request["rows"]
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(rows), max_length=64)
    generator = og.Generator(model, params)
    if request["adapter"] is not None:
        generator.set_active_adapter(adapters, request["adapter"])
    if request["after"] is not None:
        generator.append_tokens(np.array(rows, dtype=np.int32))
        generator.generate_next_token()
        generator.rewind_to(2)
        rows = [request["after"]]
    width = max(map(len, rows))
    generator.append_tokens(np.array([row + [pad] * (width - len(row)) for row in rows], dtype=np.int32))
    prompt = generator.get_output("logits")
    steps, tokens = [], []
    for _ in range(request["steps"]):
        steps.append(generator.get_logits().tolist())
        generator.generate_next_token()
        tokens.append(generator.get_next_tokens().tolist())
    return {"prompt": prompt.tolist(), "steps": steps, "tokens": np.array(tokens).T.tolist()}


def main(folder: str) -> None:
    model = og.Model(folder)
    adapters = og.Adapters(model)
    with open(f"{folder}/genai_config.json") as file:
        pad = json.load(file)["model"]["pad_token_id"]
    requests = json.load(sys.stdin)
    for name in {request["adapter"] for request in requests} - {None}:
        adapters.load(f"{folder}/adapters/{name}.onnx_adapter", name)
    json.dump([answer(model, adapters, pad, request) for request in requests], sys.stdout)


main(sys.argv[1])
