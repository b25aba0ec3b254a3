"""`export --openvino`: a backbone as a stateful model of OpenVINO, and a prefix for its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.openvino import EXACT, TITLE, start, stateful
from prefixkit.bridges.portable import GRAPH, MARKER, write_portable
from prefixkit.bridges.trial import ROWS, as_past, logits, refuse_difference, session, text
from prefixkit.errors import ConfigError
from prefixkit.format.atomic import replacing_folder
from prefixkit.prefix import Array, Prefix, key_values, save
from prefixkit.serving.report import OUTPUTS

MODEL = "openvino_model.xml"
PREFIX = "prefix.safetensors"

_README = """# {backbone} with prefixes, for OpenVINO

Written by prefixkit from an export whose logits were compared with PyTorch's. Backbone `{backbone}`, weights
`{weights}`, float32. The model keeps keys and values in states; a prefix is what they begin with.

```python
import numpy as np
import openvino as ov

from prefixkit import load
from prefixkit.bridges.openvino import EXACT, start

request = ov.Core().compile_model("openvino_model.xml", "CPU", dict(EXACT)).create_infer_request()
prefix = load("prefix.safetensors")


def write(rows, prefixes, new_tokens=40):  # rows of token ids, equally many in each; a prefix or None for each
    begun = start(request, prefixes)
    mask, positions, tokens, written = begun.mask, begun.positions[:, None], np.array(rows), []
    for _ in range(new_tokens):
        mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
        feeds = {{"input_ids": tokens, "attention_mask": mask, "position_ids": positions + np.arange(tokens.shape[1])}}
        positions = positions + tokens.shape[1]
        logits = request.infer({{name: feeds[name] for name in {inputs}}})["logits"]
        tokens = logits[:, -1:].argmax(-1)
        written.append(tokens)
    return np.concatenate(written, axis=1)


print(write([[1, 2, 3], [1, 2, 3]], [prefix, None]))  # with the prefix, and the backbone alone
```

- Left to itself, OpenVINO computes in bfloat16 and keeps keys and values in 8 bits where the processor is faster at
  that; `EXACT` asks for float32. Without it a prefix of large numbers is rounded like any other.
- Without prefixkit: the state whose name begins with `past_key_values.N.key` is [rows, kv_heads, past, head_dim], and
  begins with `decoder.self.layers.N.key` of the prefix file. `attention_mask` has ones for its slots, and positions
  count on from them.
- A prefix for other weights is not noticed where the shapes fit: compare the hash above with the prefix's
  (`prefixkit inspect`).
- OpenVINO GenAI's `LLMPipeline` has no way to give states a beginning.
"""


def export_openvino(prefix: Prefix, output: Path, *, backbone: str) -> Carried:
    """Write `backbone` and `prefix` as the folder `output`, if and only if OpenVINO computes what PyTorch computes.

    The folder has `openvino_model.xml|bin` with states, the prefix as keys and values, tokenizer and configuration, and
    a README.md with the code that runs it. Numbers are float32.

    Args:
        backbone: folder or hub id.

    Raises:
        ConfigError: openvino is not installed.
        FormatError: something besides keys and values, or a prompt, right before the text of a decoder.
        ParityError: a model computes something else than PyTorch; nothing is written.
        InputError: another backbone, or a folder that cannot be written or holds other files.
    """
    core = _core()
    with replacing_folder(output, marker=MARKER) as folder:
        made = write_portable(prefix, backbone, folder, dtype="float32", runtime=TITLE)
        length = made.prefix.manifest.injections[0].length or 0
        expected = logits(session(folder / GRAPH), as_past(key_values(made.prefix)), length)
        _convert(core, folder)
        own = save(made.prefix, folder / PREFIX)
        refuse_difference(MODEL, _logits(core, folder / MODEL, own, length), expected, TITLE)
        (folder / "README.md").write_text(_readme(own, made.facts["graph"]["inputs"]), encoding="utf-8")
    return Carried(output=output, next=f"the code in {output / 'README.md'}")


def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        step = "pip install 'prefixkit[openvino]'"
        raise ConfigError("export --openvino", expected="openvino", found="none", next_step=step) from error
    return openvino.Core()


def _convert(core: Any, folder: Path) -> None:
    """Put a stateful model in the place of the ONNX graph."""
    import openvino

    model = core.read_model(folder / GRAPH)
    stateful(model)
    openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
    # The model that was read maps these files.
    del model
    for file in folder.glob(f"{GRAPH}*"):
        file.unlink()


def _logits(core: Any, path: Path, prefix: Prefix, length: int) -> Array:
    """What `trial.logits` gives, by OpenVINO."""
    request = core.compile_model(path, "CPU", dict(EXACT)).create_infer_request()
    start(request, [prefix] * ROWS)
    names = {name for port in request.model_inputs for name in port.get_names()}
    found: Array = request.infer(text(length, names))[OUTPUTS["logits"]]
    return found


def _readme(prefix: Prefix, inputs: dict[str, str]) -> str:
    backbone = prefix.manifest.backbone
    names = [name for name in inputs.values() if "%d" not in name]
    return _README.format(backbone=backbone.name, weights=backbone.weights_hash, inputs=sorted(names))
