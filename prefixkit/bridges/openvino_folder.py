"""`export --openvino`: a backbone as a stateful model of OpenVINO, and a prefix for its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixkit.bridges.carried import Carried
from prefixkit.bridges.openvino import EXACT, TITLE, start, stateful
from prefixkit.bridges.openvino_readme import readme
from prefixkit.bridges.portable import GRAPH, runtime_folder, write_portable
from prefixkit.bridges.trial import ROWS, as_past, logits, refuse_difference, session, text
from prefixkit.errors import ConfigError
from prefixkit.prefix import Array, Prefix, key_values, save
from prefixkit.serving.report import OUTPUTS

MODEL = "openvino_model.xml"
PREFIX = "prefix.safetensors"


def export_openvino(prefix: Prefix, output: str | Path, *, backbone: str) -> Carried:
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
    core, output = _core(), Path(output)
    with runtime_folder(output, TITLE) as folder:
        made = write_portable(prefix, backbone, folder, dtype="float32", runtime=TITLE)
        length = made.prefix.manifest.injections[0].length or 0
        expected = logits(session(folder / GRAPH), as_past(key_values(made.prefix)), length)
        _convert(core, folder)
        own = save(made.prefix, folder / PREFIX)
        refuse_difference(MODEL, _logits(core, folder / MODEL, own, length), expected, TITLE)
        (folder / "README.md").write_text(readme(own, made.facts["graph"]["inputs"]), encoding="utf-8")
    return Carried(output=output, next=f"the code in {output / 'README.md'}, run in that folder")


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
