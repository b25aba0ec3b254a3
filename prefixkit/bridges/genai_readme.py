"""The README.md of a genai folder: the code that runs it, and what genai leaves to its caller."""

from __future__ import annotations

from prefixkit.bridges.genai_config import SpecialTokens
from prefixkit.bridges.genai_prompt import encode_code, examples
from prefixkit.bridges.onnx_adapter import model_version
from prefixkit.format.manifest import TaskRecord
from prefixkit.prefix import Prefix
from prefixkit.task.encode import input_fields, is_chat
from prefixkit.task.tokenizer import ModelTokenizer

_TEXT = """# {backbone} with prefixes, for onnxruntime-genai

Written by prefixkit from an export whose logits were compared with PyTorch's. Backbone `{backbone}`, weights
`{weights}`, {dtype}.
Each file in `adapters/` is a prefix; `{name}` has {length} slots.

The code runs inside this folder:

```python
{imports}from itertools import takewhile
{paths}
import numpy as np
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="false")
adapters = og.Adapters(model)
adapters.load("adapters/{name}.onnx_adapter", "{name}")


{encode}

def write(asked, prefix=None, new_tokens=40):
    rows = [encode(**fields) for fields in asked]
    width = max(map(len, rows))
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(rows), max_length=width + new_tokens)
    generator = og.Generator(model, params)
    if prefix is not None:
        generator.set_active_adapter(adapters, prefix)
    padded = [row + [{pad}] * (width - len(row)) for row in rows]
    generator.append_tokens(np.array(padded, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    written = [generator.get_sequence(row)[width:] for row in range(len(rows))]
    # What has ended is filled up with padding.
    ended = [list(takewhile(lambda id_: id_ not in {ends}, row)) for row in written]
    return [tokenizer.decode(np.array(row, dtype=np.int32)).strip() for row in ended]


print(write({examples}, "{name}"))
print(write({examples}[:1]))  # the backbone alone
```

{task}
- `set_active_adapter` comes before `append_tokens`, and holds for all rows of its generator. Rows with different
  prefixes are different generators.
- Lengths and positions are those of the text: `rewind_to(n)` keeps n tokens of it, whatever the prefix.
- genai pads on the right, and takes whatever token {pad} (`pad_token_id`) a row of several ends with for padding: a
  prompt must end with another.
- `context_length` leaves {length} of the backbone's positions to the prefix. Lower it, and `max_length`, by what a
  longer prefix has more.

Another prefix for this backbone:

```bash
prefixkit export --onnx-adapter OTHER{option} -o adapters/other.onnx_adapter
```

It stays there when the folder is exported again, as long as the weights and {dtype} stay.

Neither genai nor ONNX Runtime compares an adapter with the model. Both carry the number {version} for these weights:
the graph as `prefixkit.model_version` in its metadata, the adapter as
`AdapterFormat.read_adapter(path).get_model_version()`.

onnxruntime-genai depends on the CPU build of ONNX Runtime, which overwrites the GPU build: give it an environment of
its own. Without genai, ONNX Runtime runs the same files:

```python
import onnxruntime

onnxruntime.set_default_logger_severity(3)  # it warns of every input that has a default
session = onnxruntime.InferenceSession("model.onnx")
adapter = onnxruntime.LoraAdapter()
adapter.Load("adapters/{name}.onnx_adapter")
options = onnxruntime.RunOptions()
options.add_active_adapter(adapter)
# session.run(None, inputs, options): past_key_values.N.key|value begin with length 0; past, attention_mask and
# position_ids speak of the text only. Without the adapter, the same session is the backbone alone.
```
"""


_CHAT = """Prompts are conversations, and `rendered` is one as the chat template of transformers renders it:

```python
AutoTokenizer.from_pretrained(".").apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
```

genai's own `apply_chat_template` trims no blocks and has other special tokens: it may write what the prefix was not
trained on. A message that spells a special token has it, so check messages of strangers before.
"""


def readme(prefix: Prefix, name: str, tokens: SpecialTokens, dtype: str, tokenizer: ModelTokenizer) -> str:
    """The text for a folder of `dtype` with `tokenizer`, whose adapter for `prefix` is called `name`."""
    backbone, task = prefix.manifest.backbone, prefix.manifest.task
    chat = task is not None and is_chat(task)
    return _TEXT.format(
        backbone=backbone.name,
        weights=backbone.weights_hash,
        dtype=dtype,
        name=name,
        length=prefix.manifest.injections[0].length,
        imports="" if chat else "import json\nimport re\n",
        paths="" if chat else "from pathlib import Path\n",
        encode=encode_code(task, tokenizer),
        examples=list(examples(task, tokenizer)),
        pad=tokens.pad,
        ends=set(tokens.ends),
        task=_contract(task),
        option="" if dtype == "float32" else f" --dtype {dtype}",
        version=model_version(backbone),
    )


def _contract(task: TaskRecord | None) -> str:
    if task is None:
        return "The prefix states no task: what its prompts look like is for its maker to say.\n"
    if is_chat(task):
        return _CHAT
    fields = " and ".join(f"`{name}`" for name in input_fields(task))
    ends = " or ".join(f"`{stop}`" for stop in task.stop)
    return f"An input has the field {fields}. Text ends with {ends}, which `eos_token_id` has.\n"
