"""`export_onnx`: a frozen backbone and a prefix as a folder that onnxruntime serves, verified before it is there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from prefixkit.backbones.backbone import Backbone
from prefixkit.errors import ConfigError
from prefixkit.export.buffered import BufferedExport
from prefixkit.export.decoder import DecoderExport
from prefixkit.export.delta_weights import written_into
from prefixkit.export.kind import Export
from prefixkit.export.pair import PairExport, is_pair
from prefixkit.export.parity import CaseResult
from prefixkit.export.quantized import BITS
from prefixkit.export.reader import ReaderExport, is_reader
from prefixkit.export.report import GRAPH, PREFIX, report_document, with_results
from prefixkit.export.rounded_cache import KINDS
from prefixkit.export.verify import refuse_differences
from prefixkit.export.weights import WEIGHTS, Weights
from prefixkit.format.atomic import replacing_folder
from prefixkit.prefix import Prefix, load, save
from prefixkit.serving.report import FILE

DTYPES = {"portable": ("float32", "float16"), "cuda": ("float32", "float16", "bfloat16")}
"""By target."""
COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
    "preprocessor_config.json",
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
    backbone: Backbone | str | Path,
    out_dir: str | Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    target: Literal["portable", "cuda"] = "portable",
    baked: bool = False,
    weights: Weights | None = None,
    quantize: Literal["int4", "int8"] | None = None,
    kv_cache: Literal["int8"] | None = None,
    allow_mismatch: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Exported:
    """Write `backbone` and `prefix` to `out_dir` for onnxruntime, if and only if it computes what PyTorch computes.

    The folder has `onnx/model.onnx`, tokenizer and configuration, `prefix.safetensors` and the report `export.json`.
    For an encoder-decoder there are two graphs, `onnx/encoder_model.onnx` and `onnx/decoder_model.onnx`. An encoder,
    and a decoder below a file's head, give final states and logits of whole inputs: see `prefixkit.serving.reader`.

    Args:
        prefix: a loaded prefix or its file; None exports the bare backbone, which takes any prefix later.
        backbone: a loaded backbone, a folder or a hub id.
        out_dir: a new folder, an empty one, or one that this function wrote, which is replaced.
        dtype: of weights, cache and computation. Logits are float32 in any. Half precision is for decoders that write,
            bfloat16 for the target `cuda`. On a machine without a GPU, which cannot run bfloat16, the same export in
            float32 is verified in its place.
        baked: put the prefix into the graph, which then is an ordinary decoder to any runtime: past, mask and
            positions speak of the text only. It serves this prefix and no other. For decoders that write; a file
            with deltas, which change the weights of the graph, is always exported so.
        target: `portable` is one graph of operators that every runtime knows. `cuda` is for serving many prefixes:
            graphs over buffers of a fixed capacity (`prefixkit.serving.engine`), which run on the CPU as well.
        weights: where they are stored; see `prefixkit.export.weights.save_graph`. None is `external`, or for `cuda`
            `checkpoint` where that has the dtype of the export.
        quantize: `int4` or `int8`, of the weights of linear layers: see `prefixkit.export.quantized`. For `cuda`.
        kv_cache: `int8` keeps keys and values, of prefixes as well, in eight bits: see
            `prefixkit.export.rounded_cache`. For `cuda`.
        allow_mismatch: take a prefix made for other weights.
        progress: hears the name of each stage.

    Raises:
        ParityError: onnxruntime computes something else; nothing is written.
        MismatchError: the prefix was made for another backbone.
        InputError: options, files or a folder that cannot be used.
    """
    _check_options(dtype, baked, weights, prefix, target)
    _check_quantize(quantize, weights, target)
    _check_rounding("--kv-cache", kv_cache, KINDS, target)
    loaded = load(prefix) if isinstance(prefix, (str, Path)) else prefix
    export = _export(loaded, backbone, dtype, baked, target, quantize, kv_cache)
    stages = _Progress(progress)
    with stages.stage("loading"):
        export.load(backbone, allow_mismatch)
    weights = weights or export.usual_weights
    with replacing_folder(out_dir, marker=FILE) as folder:
        _write(export, folder, weights, stages)
        draft = _draft(export, folder, weights)
        with stages.stage("verifying"):
            cases = _verified(export, folder)
        refuse_differences(cases)
        _write_report(folder, with_results(draft, cases, stages.seconds))
    size = sum(file.stat().st_size for file in Path(out_dir).rglob("*") if file.is_file())
    return Exported(Path(out_dir), cases, dict(stages.seconds), size)


def _export(
    prefix: Prefix | None,
    backbone: Backbone | str | Path,
    dtype: str,
    baked: bool,
    target: str,
    quantize: str | None,
    kv_cache: str | None,
) -> Export:
    kind: type[Export]
    kind = PairExport if is_pair(backbone, prefix) else ReaderExport if is_reader(backbone, prefix) else DecoderExport
    if target == "cuda":
        if kind is not DecoderExport:
            expected, step = "a decoder that writes", "use --target portable"
            raise ConfigError("--target cuda", expected=expected, found="another kind of model", next_step=step)
        return BufferedExport(prefix, dtype=dtype, baked=baked, quantize=quantize, kv_cache=kv_cache)
    return kind(prefix, dtype=dtype, baked=baked)


def _write(export: Export, folder: Path, weights: Weights, stages: _Progress) -> None:
    """Everything but the report."""
    (folder / GRAPH).parent.mkdir()
    source = export.backbone.folder
    with written_into(export.backbone.model, export.received):
        with stages.stage("tracing"):
            graphs = export.graphs()
        with stages.stage("saving"):
            export.save(graphs, folder, weights)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if export.prefix is not None and not export.baked:
        export.prefix = save(export.prefix, folder / PREFIX)


def _draft(export: Export, folder: Path, weights: str) -> Mapping[str, Any]:
    """The report without results, which verification reads as serving does."""
    draft = report_document(
        folder,
        export.backbone.identity,
        export.prefix,
        export.parts(),
        dtype=export.dtype,
        baked=export.baked,
        weights=weights,
    )
    _write_report(folder, draft)
    return draft


def _check_options(dtype: str, baked: bool, weights: str | None, prefix: object, target: str) -> None:
    if target not in DTYPES:
        raise ConfigError("--target", expected=" or ".join(DTYPES), found=repr(target))
    if dtype not in DTYPES[target]:
        raise ConfigError("--dtype", expected=" or ".join(DTYPES[target]), found=repr(dtype))
    if target == "cuda" and weights == "inline":
        step = "use external or checkpoint"
        raise ConfigError("--weights", expected="one file for all graphs", found="inline", next_step=step)
    if weights is not None and weights not in WEIGHTS:
        raise ConfigError("--weights", expected=", ".join(WEIGHTS), found=repr(weights))
    if baked and prefix is None:
        raise ConfigError("--baked", expected="a prefix to bake", found="none", next_step="name the prefix file")


def _check_rounding(option: str, kind: str | None, known: Iterable[str], target: str) -> None:
    """Raise ConfigError for a way to round that is unknown, or for another target than `cuda`."""
    if kind is not None and kind not in known:
        raise ConfigError(option, expected=" or ".join(known), found=repr(kind))
    if kind is not None and target != "cuda":
        raise ConfigError(option, expected="--target cuda", found=f"--target {target}")


def _check_quantize(quantize: str | None, weights: str | None, target: str) -> None:
    _check_rounding("--quantize", quantize, BITS, target)
    if quantize is not None and weights == "checkpoint":
        step = "leave --weights out"
        raise ConfigError(
            "--quantize", expected="rounded weights in a file of their own", found=weights, next_step=step
        )


def _verified(export: Export, folder: Path) -> tuple[CaseResult, ...]:
    twin = export.twin(folder)
    if twin is None:
        return export.verify(folder)
    with TemporaryDirectory(dir=folder.parent, prefix=".twin-") as made:
        beside = Path(made)
        _write(twin, beside, "external", _Progress(lambda stage: None))
        _draft(twin, beside, "external")
        return tuple(replace(case, name=f"{case.name}, in float32") for case in twin.verify(beside))


def _write_report(folder: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
