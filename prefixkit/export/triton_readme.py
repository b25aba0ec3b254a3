"""The README.md of a Triton repository: how a client uses the models, and what Triton does not do for it."""

from __future__ import annotations

from collections.abc import Mapping

from prefixkit.serving.report import ExportedFolder

_HEAD = """# {backbone} on Triton

Written by prefixkit from an exported folder whose outputs were compared with PyTorch's. Backbone `{backbone}`, weights
`{weights}`; the parameters in each config.pbtxt say the same.

```bash
tritonserver --model-repository=. --allow-client-shm=true
```

The graphs are of ONNX opset {opset}, which the ONNX Runtime of your Triton must know. Every dimension is the graph's
own (`max_batch_size` is 0), and -1 one that a request chooses. Where a file of weights has several names it is stored
once: `cp -a` and `rsync -H` keep it so. Graphs, names, types and dimensions were checked with ONNX Runtime, not with
Triton itself.
"""

_BUFFERS = """
## The models

| model | takes | gives |
|---|---|---|
| `{place}` | buffers and a prefix | the buffers, the prefix in slots 0, 1, … of their rows |
| `{prompts}` | any number of tokens a row | logits and the likeliest token after each row's `last`; the buffers |
| `{decode}` | one token a row | the same |

Keys and values are buffers `[rows, kv_heads, capacity, head_dim]`, two a layer, `past_key_values.N.key|value` going in
and `present.N.key|value` coming out. The client chooses rows and capacity, and keeps the buffers:

1. Make one region of shared memory for each buffer (`tritonclient.utils.cuda_shared_memory` on the same machine's GPU,
   `shared_memory` otherwise), register them, and name a region both for the input and for the output that replaces it:
   this backend lets ONNX Runtime write elsewhere and copies into the region when the pass is over. Without a shared
   machine the buffers travel in every request and every answer, which is too slow for more than a trial.
2. To begin a text in row r, send the tensors of a prefix, `decoder.self.layers.N.key|value` of its file in {dtype} and
   with a first axis of 1, as `prefix.N.key|value` to `{place}`, with the regions at the offset of row r. Compare the
   hashes of its backbone with those in config.pbtxt first: nobody else does.
3. Send prompts to `{prompts}`, padded on the right; `write_index` is the slot where a row goes on (at first the length
   of its prefix), `last` the place of its last real token{positions}. Then add the row's tokens to its `write_index`.
4. Send `token`, or what you draw from `logits`, to `{decode}`, until a stop token of the prefix's task.

Implicit state is no way to keep the buffers: a state belongs to one model, and here three write to it.

## What Triton does not do

- Put the texts of several clients into one pass, or let one begin while others go on: rows belong to their client.
- Write in place: all of the buffers are copied after every pass.
- Hold the weights once: `{prompts}` and `{decode}` each load them. To spare memory remove `{decode}` and send single
  tokens to `{prompts}`, which takes them as well.
- Know prefixes, templates, stop tokens or sampling.

`prefixkit serve`, and its application for Ray Serve on several machines, do all of this.
"""

_PLAIN = """
## The models

{models}

The contract of inputs and outputs is in `export.json` of the exported folder. Where there is a `past` it is what the
answer before called `present`, and at first the prefix itself, or of length 0; a client on the same machine keeps it in
shared memory. Triton puts no requests together, and knows no prefixes, templates, stop tokens or sampling:
`prefixkit serve` does, with a folder that was exported with `--target cuda`.
"""


def readme(report: ExportedFolder, names: Mapping[str, str], opset: int) -> str:
    """The text for models whose `names` are given by role."""
    backbone = report.backbone
    head = _HEAD.format(backbone=backbone.name, weights=backbone.weights_hash, opset=opset)
    if report.buffered is None:
        return head + _PLAIN.format(models="\n".join(f"- `{name}`" for name in names.values()))
    positions = ", `position_ids` count its real tokens from its prefix's `text_start` on"
    return head + _BUFFERS.format(**names, dtype=report.dtype, positions=positions if report.takes_positions else "")
