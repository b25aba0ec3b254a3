"""What the JavaScript tests compare with: files, and what PyTorch and prefixkit make of them, as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from prefixkit.format.manifest import TaskRecord
from prefixkit.prefix import Prefix, key_values, load, save
from prefixkit.task import encode_prompt, load_tokenizer
from tests.exported import LENGTH, TASK, backbone, exported
from tests.format.test_header import DEFECTS
from tests.prefixes import GOLDEN, small_prefix, write_safetensors
from tests.small_tokenizer import END, small_backend, write_folder

ROWS = ((5, 6, 7, 8, 9, 10), (61, 90, 200, 12, 77, 140))
NEW_TOKENS = 12
DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
SAID = ("Blue Spice", f"a {END} b", "naïve 日本 🙂", "  two  spaces\n", "<s>", "{input}")
TASKS = {
    "say": TASK,
    "braces": replace(TASK, input_template="{{{input}}} :", separator=" =>"),
    "special": replace(TASK, input_template="<|im_start|>{input}<|im_end|> end", separator=f"{END}"),
    "bos": replace(TASK, bos="after", separator=""),
}


def numbers_as(prefix: Prefix, dtype: Any) -> Prefix:
    """`prefix` with its numbers rounded to `dtype`."""
    return Prefix(prefix.manifest, {name: array.astype(dtype) for name, array in prefix.tensors.items()})


def family_case(family: str, root: Path) -> dict[str, Any]:
    """An exported folder, its prefix in three dtypes, and PyTorch's logits and greedy tokens for each and without."""
    folder = exported(family).folder
    prefix = load(folder / "prefix.safetensors")
    model = AutoModelForCausalLM.from_pretrained(backbone(family)).eval()
    case: dict[str, Any] = {"family": family, "folder": str(folder), "length": LENGTH, "rows": ROWS, "prefixes": {}}
    for name, dtype in DTYPES.items():
        rounded, file = numbers_as(prefix, dtype), root / f"{family}-{name}.safetensors"
        save(rounded, file)
        case["prefixes"][name] = {"file": str(file), "logits": logits(model, rounded), "greedy": greedy(model, rounded)}
    save(Prefix(other_weights(prefix), prefix.tensors), root / f"{family}-other.safetensors")
    halves = {name: array.astype(np.float16).view(np.uint16) for name, array in prefix.tensors.items()}
    case["halves"] = {name: array.ravel().tolist() for name, array in halves.items()}
    bare = {"logits": logits(model, None), "greedy": greedy(model, None)}
    return {**case, "bare": bare, "other": str(root / f"{family}-other.safetensors")}


def other_weights(prefix: Prefix) -> Any:
    return replace(prefix.manifest, backbone=replace(prefix.manifest.backbone, weights_hash="b3t-v1:" + "0" * 64))


def logits(model: Any, prefix: Prefix | None) -> list[Any]:
    """[rows, tokens, vocabulary] of ROWS behind `prefix`."""
    found: list[Any] = _steps(model, prefix, torch.tensor(ROWS)).logits.tolist()
    return found


def greedy(model: Any, prefix: Prefix | None) -> list[int]:
    """What is written behind the first row, whatever it is."""
    step = _steps(model, prefix, torch.tensor(ROWS[:1]))
    written = [int(step.logits[0, -1].argmax())]
    while len(written) < NEW_TOKENS:
        with torch.no_grad():
            step = model(torch.tensor([written[-1:]]), past_key_values=step.past_key_values)
        written.append(int(step.logits[0, -1].argmax()))
    return written


def _steps(model: Any, prefix: Prefix | None, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    for layer, pair in enumerate(key_values(prefix) if prefix is not None else ()):
        cache.update(*(torch.from_numpy(half.astype(np.float32)).repeat(len(ids), 1, 1, 1) for half in pair), layer)
    with torch.no_grad():
        return model(ids, past_key_values=cache)


def prompt_cases(root: Path) -> Iterator[dict[str, Any]]:
    """Tokenizers, tasks and texts, and the ids that prefixkit gives them."""
    for bos in (False, True):
        config = {"bos_token": "<s>" if bos else END, "eos_token": END}
        folder = write_folder(root / f"tokenizer-{bos}", small_backend(adds_bos=bos), tokenizer_config=config)
        tokenizer = load_tokenizer(folder)
        for name, task in TASKS.items():
            asked = [{"text": text, "ids": encode_prompt(task, tokenizer, {"input": text})} for text in SAID]
            yield {"name": name, "folder": str(folder), "task": _document(task), "asked": asked}


def _document(task: TaskRecord) -> dict[str, Any]:
    names = ("name", "input_template", "separator", "target_template", "bos", "stop", "max_length")
    return {name: getattr(task, name) for name in names}


def defect_cases(root: Path) -> Iterator[dict[str, str]]:
    """Files that no reader may take, and a part of what is said of them, where that is fixed."""
    for number, (name, (header, size, _)) in enumerate(DEFECTS.items()):
        path = write_safetensors(root / f"defect-{number}", header, bytes(size))
        yield {"name": name, "file": str(path), "says": ""}
    for name, (data, says) in _changed_files(root).items():
        path = root / f"{name.replace(' ', '-')}.safetensors"
        path.write_bytes(data)
        yield {"name": name, "file": str(path), "says": says}


def _changed_files(root: Path) -> dict[str, tuple[bytes, str]]:
    save(small_prefix(), root / "small.safetensors")
    whole = (root / "small.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length], whole[8 + length :]
    header = json.loads(text)
    manifest = header["__metadata__"]["prefixkit"]

    def with_manifest(**changes: Any) -> bytes:
        changed = json.dumps({**json.loads(manifest), **changes}, sort_keys=True, separators=(",", ":"))
        return _file({**header, "__metadata__": {"format": "pt", "prefixkit": changed}}, data)

    prompt = [{"kind": "embedding_prompt", "length": 3, "placement": "prepend"}]
    made, backbone = (json.loads(manifest)[name] for name in ("provenance", "backbone"))
    slots = [{**json.loads(manifest)["injections"][0], "placement": "slots"}]
    return {
        "nothing": (b"", "a safetensors file of 8 bytes or more"),
        "a gibibyte of header": ((2**30).to_bytes(8, "little") + b"{}", "at most 2097152 bytes"),
        "a truncated file": (whole[:-1], "truncated?"),
        "trailing bytes": (whole + b"x", "trailing bytes"),
        "NaN": (whole[:-4] + b"\x00\x00\xc0\x7f", "found NaN or Infinity"),
        "a number of another value": (whole[:-4] + b"\x00\x00\xc0\x3f", "damaged or edited"),
        "no prefix file": (_file({**header, "__metadata__": {"format": "pt"}}, data), "found other safetensors"),
        "more metadata": (_file({**header, "__metadata__": {**header["__metadata__"], "a": "b"}}, data), "alone"),
        "nested without end": (b"\xff\xff\x0f" + bytes(5) + b"[" * 0xFFFFF, "starts with '{'"),
        "nested within": (_file(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}", b""), "nested 64 deep at most"),
        "a newer schema": (with_manifest(schema=2), "take the prefix.mjs of a newer release"),
        "another kind": (with_manifest(injections=prompt), "use the prefix.safetensors of its folder"),
        "slots of the text": (with_manifest(injections=slots), "found slots"),
        "a kind that is a list": (with_manifest(injections=[{"kind": [[1]], "toString": 1}]), "found a list"),
        "a name that is no text": (with_manifest(task={"name": {"toString": 1}}), "text as name; found object"),
        "no provenance": (with_manifest(provenance=None), "a provenance with method; found nothing"),
        "metrics that are a list": (with_manifest(provenance={**made, "metrics": [1]}), "metrics; found a list"),
        "a hash that is a number": (with_manifest(backbone={**backbone, "weights_hash": 1}), "weights_hash; found 1"),
        "a backbone without a name": (with_manifest(backbone={**backbone, "name": None}), "name; found nothing"),
        "an edited manifest": (with_manifest(provenance={"method": "x", "prefixkit": "0"}), "damaged or edited"),
    }


def _file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def half_cases() -> list[tuple[float, int]]:
    """float32 numbers and the bits of the nearest float16: all that it has, those halfway between, and others."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    halfway = (every[1:] + every[:-1]) / 2
    some = np.random.default_rng(0).normal(size=2000).astype(np.float32) * np.float32(1e-3)
    ends = np.array([65519.0, -0.0], np.float32)
    picked = np.concatenate([every[::7], halfway[::7], -halfway[::31], some, ends])
    halves = picked.astype(np.float16).view(np.uint16)
    return list(zip(picked.tolist(), halves.tolist(), strict=True))


def write_cases(root: Path, families: Sequence[str]) -> Path:
    """Everything, as `cases.json` in `root`."""
    small = small_prefix()
    large = {name: array + 70000 for name, array in small.tensors.items()}
    save(Prefix(small.manifest, large), root / "large.safetensors")
    cases = {
        "families": [family_case(family, root) for family in families],
        "prompts": list(prompt_cases(root)),
        "defects": list(defect_cases(root)),
        "halves": half_cases(),
        "large": str(root / "large.safetensors"),
        "golden": str(GOLDEN),
    }
    (root / "cases.json").write_text(json.dumps(cases))
    return root / "cases.json"
