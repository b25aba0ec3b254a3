"""The README.md of an OpenVINO folder: the code that asks as the task of its prefix says."""

from __future__ import annotations

from collections.abc import Mapping

from prefixkit.format.manifest import TaskRecord
from prefixkit.prefix import Prefix
from prefixkit.task.encode import input_fields, is_chat

_TEXT = """# {backbone} with prefixes, for OpenVINO

Written by prefixkit from an export whose logits were compared with PyTorch's. Backbone `{backbone}`, weights
`{weights}`, float32. The model keeps keys and values in states; a prefix is what they begin with.
The code runs inside this folder:

```python
import numpy as np
import openvino as ov

from prefixkit import load
from prefixkit.bridges.openvino import EXACT, start
from prefixkit.task import {imports}

request = ov.Core().compile_model("openvino_model.xml", "CPU", dict(EXACT)).create_infer_request()
prefix, tokenizer = load("prefix.safetensors"), load_tokenizer(".")
task = prefix.manifest.task


def generate(rows, prefixes, new_tokens=40):  # rows of token ids; a prefix or None for each
    width = max(map(len, rows))
    tokens = np.array([[0] * (width - len(row)) + row for row in rows])
    real = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    begun = start(request, prefixes)
    mask = np.concatenate([begun.mask, real], axis=1)
    positions = np.maximum(begun.positions[:, None] + real.cumsum(1) - 1, 0)
    written = []
    for _ in range(new_tokens):
        feeds = {{"input_ids": tokens, "attention_mask": mask, "position_ids": positions}}
        logits = request.infer({{name: feeds[name] for name in {inputs}}})["logits"]
        tokens, positions = logits[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
        written.append(tokens)
    return np.concatenate(written, axis=1)


def write(asked, prefixes, new_tokens=40):  # inputs of the task; a prefix or None for each
    rows = [{encoded} for fields in asked]
    return [{decoded} for row in generate(rows, prefixes, new_tokens)]


asked = {example}
print(write([asked, asked], [prefix, None]))  # with the prefix, and the backbone alone
```

{task}
- Left to itself, OpenVINO computes in bfloat16 and keeps keys and values in 8 bits where the processor is faster at
  that; `EXACT` asks for float32. Without it a prefix of large numbers is rounded like any other.
- Without prefixkit: the state whose name begins with `past_key_values.N.key` is [rows, kv_heads, past, head_dim], and
  begins with `decoder.self.layers.N.key` of the prefix file. `attention_mask` has ones for its slots, and positions
  count on from them.
- A prefix for other weights is not noticed where the shapes fit: compare the hash above with the prefix's
  (`prefixkit inspect`).
- OpenVINO GenAI's `LLMPipeline` has no way to give states a beginning.
"""


def readme(prefix: Prefix, inputs: Mapping[str, str]) -> str:
    """The text for a folder with `prefix`; `inputs` are those of the graph, by what they are."""
    backbone, task = prefix.manifest.backbone, prefix.manifest.task
    return _TEXT.format(
        backbone=backbone.name,
        weights=backbone.weights_hash,
        inputs=sorted(name for name in inputs.values() if "%d" not in name),
        imports="load_tokenizer" if task is None else "decode_target, encode_prompt, load_tokenizer",
        encoded='tokenizer.encode_text(fields["input"])' if task is None else "encode_prompt(task, tokenizer, fields)",
        decoded="tokenizer.decode(row.tolist())" if task is None else "decode_target(task, tokenizer, row.tolist())",
        example=_example(task),
        task=_contract(task),
    )


def _example(task: TaskRecord | None) -> dict[str, str]:
    names = ("input",) if task is None or is_chat(task) else input_fields(task)
    return dict.fromkeys(names, "a text")


def _contract(task: TaskRecord | None) -> str:
    if task is None:
        return "The prefix states no task: what its prompts look like is for its maker to say.\n"
    if is_chat(task):
        return "An input is a conversation: `messages`, or `input` for what a user says first.\n"
    fields = " and ".join(f"`{name}`" for name in input_fields(task))
    return f"An input has the field {fields}; `encode_prompt` and `decode_target` do as training did.\n"
