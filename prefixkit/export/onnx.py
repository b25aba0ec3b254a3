"""`export_onnx`: a frozen backbone and a prefix as a folder that onnxruntime serves, verified before it is there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.backbones.folding import folded
from prefixkit.backbones.geometry import refuse_swallowed
from prefixkit.backbones.load import load_decoder
from prefixkit.errors import ConfigError, InputError
from prefixkit.export.pair import fitting_pair, is_pair, load_pair, refuse_for_pair, trace_pair
from prefixkit.export.pair_verify import verify_pair
from prefixkit.export.parity import CaseResult
from prefixkit.export.report import GRAPH, PREFIX, report_document, with_results
from prefixkit.export.tracing import trace
from prefixkit.export.verify import refuse_differences, verify
from prefixkit.export.weights import WEIGHTS, Weights, save_graph
from prefixkit.export.wrapper import takes_positions
from prefixkit.format.atomic import replacing_folder
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes, key_value_prefix
from prefixkit.prefix import Prefix, load, matches, save
from prefixkit.serving.report import FILE

_Received = KeyValuePrefix | KeyValuePrefixes | None
DTYPES = ("float32", "float16")
COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""What is copied from the backbone's folder: what serving and other runtimes read beside a graph."""


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: where it is.
        cases: how its logits compared to PyTorch's.
        seconds: what tracing, saving and verifying took.
        bytes: the size of all its files.
    """

    folder: Path
    cases: tuple[CaseResult, ...]
    seconds: Mapping[str, float]
    bytes: int

    @property
    def max_abs_difference(self) -> float:
        """The largest difference between a logit of onnxruntime and of PyTorch in float32."""
        return max(case.max_abs_difference for case in self.cases)


@dataclass
class _Progress:
    tell: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.tell(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


def export_onnx(
    prefix: Prefix | str | Path | None,
    backbone: Decoder | EncoderDecoder | str | Path,
    out_dir: str | Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    baked: bool = False,
    weights: Weights = "external",
    allow_mismatch: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write `backbone` and `prefix` to `out_dir` for onnxruntime, if and only if it computes what PyTorch computes.

    The folder has `onnx/model.onnx`, tokenizer and configuration, `prefix.safetensors` and the report `export.json`.
    For an encoder-decoder there are two graphs, `onnx/encoder_model.onnx` and `onnx/decoder_model.onnx`.

    Args:
        prefix: a loaded prefix or its file; None exports the bare backbone, which takes any prefix later.
        backbone: a loaded backbone, a folder or a hub id.
        out_dir: a new folder, an empty one, or one that this function wrote, which is replaced.
        dtype: of weights, cache and computation. Logits are float32 in either. Encoder-decoders take float32 only.
        baked: put the prefix into the graph, which then is an ordinary decoder to any runtime: past, mask and
            positions speak of the text only. It serves this prefix and no other. Of decoders only.
        weights: where they are stored; see `prefixkit.export.weights.save_graph`.
        allow_mismatch: take a prefix made for other weights.
        progress: hears the name of each stage.

    Raises:
        ParityError: onnxruntime computes something else; nothing is written.
        MismatchError: the prefix was made for another backbone.
        InputError: options, files or a folder that cannot be used.
    """
    _check_options(dtype, baked, weights, prefix)
    loaded = load(prefix) if isinstance(prefix, (str, Path)) else prefix
    pair = is_pair(backbone, loaded)
    if pair:
        refuse_for_pair(loaded, dtype, baked)
    else:
        _refuse_encoder(loaded)
    stages = _Progress(progress)
    with stages.stage("loading"):
        model = load_pair(backbone, dtype) if pair else _decoder(backbone, dtype)
        loaded, injection = _fitting(loaded, model, allow_mismatch)
    with replacing_folder(out_dir, marker=FILE) as folder:
        (folder / GRAPH).parent.mkdir()
        with stages.stage("tracing"):
            graphs = _graphs(model, injection if baked else None)
        with stages.stage("saving"):
            for file, graph in graphs.items():
                save_graph(graph, folder / file, weights, model.folder)
            _copy_companions(model.folder, folder)
            if loaded is not None and not baked:
                loaded = save(loaded, folder / PREFIX)
        draft = report_document(folder, model, loaded, dtype=dtype, baked=baked, weights=weights)
        _write_report(folder, draft)
        with stages.stage("verifying"):
            cases = _verified(folder, model, injection)
        refuse_differences(cases)
        _write_report(folder, with_results(draft, cases, stages.seconds))
    size = sum(file.stat().st_size for file in Path(out_dir).rglob("*") if file.is_file())
    return Exported(Path(out_dir), cases, dict(stages.seconds), size)


def _check_options(dtype: str, baked: bool, weights: str, prefix: object) -> None:
    if dtype not in DTYPES:
        raise ConfigError("--dtype", expected=" or ".join(DTYPES), found=repr(dtype))
    if weights not in WEIGHTS:
        raise ConfigError("--weights", expected=", ".join(WEIGHTS), found=repr(weights))
    if baked and prefix is None:
        raise ConfigError("--baked", expected="a prefix to bake", found="none", next_step="name the prefix file")


def _refuse_encoder(prefix: Prefix | None) -> None:
    if prefix is not None and "encoder" in prefix.manifest.backbone.stacks:
        expected, found = "a prefix for a decoder or an encoder-decoder", "one for an encoder"
        step = "`prefixkit eval` runs it; this version exports no encoders"
        raise InputError("export --onnx", expected=expected, found=found, next_step=step)


def _decoder(backbone: Backbone | str | Path, dtype: str) -> Decoder:
    if isinstance(backbone, Decoder):
        if str(backbone.model.dtype) == f"torch.{dtype}":
            return backbone
        backbone = backbone.folder
    return load_decoder(backbone.folder if isinstance(backbone, Backbone) else backbone, dtype=dtype)


def _fitting(
    prefix: Prefix | None, backbone: Decoder | EncoderDecoder, allow_mismatch: bool
) -> tuple[Prefix | None, _Received]:
    """`prefix` with its prompt folded, and what it injects; refused where `backbone` cannot have it."""
    if prefix is None:
        return None, None
    if isinstance(backbone, EncoderDecoder):
        return prefix, fitting_pair(prefix, backbone, allow_mismatch)
    matches(prefix, backbone.identity, allow_mismatch=allow_mismatch)
    prefix = folded(prefix, backbone.release())
    injection = key_value_prefix(prefix)
    _refuse_unplaceable(injection, backbone)
    return prefix, injection


def _refuse_unplaceable(injection: KeyValuePrefix, decoder: Decoder) -> None:
    refuse_swallowed(decoder.geometry, injection.length, decoder.identity.name)
    if not takes_positions(decoder.model) and injection.positions.text_start != injection.length:
        raise InputError(
            f"prefix for {decoder.identity.name}",
            expected=f"a text that starts at {injection.length}: the model counts its prefix",
            found=f"one that starts at {injection.positions.text_start}",
        )
    limit = decoder.context_length
    if limit is not None and injection.positions.text_start >= limit:
        found = f"a prefix that leaves none of its {limit}"
        raise InputError(decoder.identity.name, expected="room for text in the context", found=found)


def _graphs(backbone: Decoder | EncoderDecoder, baked: _Received) -> Mapping[str, ir.Model]:
    """The graphs of the folder, by file."""
    if isinstance(backbone, EncoderDecoder):
        return trace_pair(backbone)
    assert not isinstance(baked, KeyValuePrefixes)
    return {GRAPH: trace(backbone.release(), backbone.geometry, baked)}


def _verified(folder: Path, backbone: Decoder | EncoderDecoder, received: _Received) -> tuple[CaseResult, ...]:
    if isinstance(backbone, EncoderDecoder):
        assert not isinstance(received, KeyValuePrefix)
        return verify_pair(folder, backbone, received)
    assert not isinstance(received, KeyValuePrefixes)
    return verify(folder, backbone, received)


def _copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_report(folder: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
