"""Imports go down only: each package may import what lies below it, and its siblings not at all."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS: dict[str, int] = {
    "prefixkit": 0,
    "prefixkit.errors": 0,
    "prefixkit.settings": 0,
    "prefixkit.spelling": 0,
    "prefixkit.format": 0,
    "prefixkit.prefix": 1,
    "prefixkit.rounding": 1,
    "prefixkit.task": 1,
    "prefixkit.algebra": 2,
    "prefixkit.serving": 2,
    "prefixkit.injections": 3,
    "prefixkit.backbones": 4,
    "prefixkit.methods": 4,
    "prefixkit.data": 4,
    "prefixkit.training": 5,
    "prefixkit.export": 5,
    "prefixkit.quickstart": 5,
    "prefixkit.bridges": 6,
    "prefixkit.cli": 7,
    "prefixkit.__main__": 8,
}
# errors, settings, spelling and format share the ground: they are the only neighbours who meet.
GROUND = {name for name, floor in FLOORS.items() if floor == 0}

FROM_FLOOR = {
    "numpy": 1,
    "ml_dtypes": 1,
    "tokenizers": 1,
    "jinja2": 1,
    "onnxruntime": 2,
    "starlette": 2,
    "uvicorn": 2,
    "prometheus_client": 2,
    "torch": 3,
    "PIL": 4,
    "transformers": 4,
    "safetensors": 4,
    "huggingface_hub": 4,
    "onnx": 5,
    "onnxscript": 5,
    "onnx_ir": 5,
    "sacrebleu": 5,
    "peft": 5,
    "llama_cpp": 5,
    "ray": 5,
    "vllm": 5,
    "openvino": 5,
    "optuna": 5,
    "sqlalchemy": 5,
    "typer": 7,
    "rich": 7,
}
EVERYWHERE = {"blake3", "__future__"}
# The lazy surface in __init__.py names everything and imports it on first use only.
SURFACE = "prefixkit"


def home(module: str) -> str:
    """The entry of FLOORS that `module` lives in."""
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else parts[0]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Every module that `source` imports, wherever it does, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if base == "prefixkit" and inner in FLOORS else base


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that go up, sideways, or to a package that its floor does without."""
    here = home(module)
    found = []
    for line, imported in imports(source):
        name = imported.split(".")[0]
        if imported.startswith("."):
            found.append(f"{module}:{line} imports {imported}: imports are absolute")
        elif name == "prefixkit":
            there = home(imported)
            allowed = there == here or FLOORS[there] < FLOORS[here] or {here, there} <= GROUND
            if not allowed:
                found.append(f"{module}:{line} imports {imported}: up or sideways")
        elif name in FROM_FLOOR:
            if FROM_FLOOR[name] > FLOORS[here]:
                found.append(f"{module}:{line} imports {imported}: begins on floor {FROM_FLOOR[name]}")
        elif name not in sys.stdlib_module_names and name not in EVERYWHERE:
            found.append(f"{module}:{line} imports {imported}: unknown to the floors")
    return found


def modules() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "prefixkit").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != SURFACE:
            yield name, path.read_text(encoding="utf-8")


def test_imports_go_down_only() -> None:
    assert [found for name, source in modules() for found in violations(name, source)] == []


def test_every_module_has_a_floor() -> None:
    assert {home(name) for name, _ in modules()} == set(FLOORS) - {SURFACE}


def test_the_test_can_fail() -> None:
    for module, source in [
        ("prefixkit.format.header", "import numpy"),
        ("prefixkit.format.header", "from prefixkit.prefix import load"),
        ("prefixkit.format.header", "from prefixkit import prefix"),
        ("prefixkit.prefix", "def late():\n    import torch"),
        ("prefixkit.prefix", "from prefixkit.task import encode"),
        ("prefixkit.serving.session", "import transformers"),
        ("prefixkit.methods.prefix_tuning", "from prefixkit.backbones.load import load_backbone"),
        ("prefixkit.training.loop", "from prefixkit.export.onnx import export"),
        ("prefixkit.export.onnx", "from prefixkit.bridges.carried import Carried"),
        ("prefixkit.training.loop", "import typer"),
        ("prefixkit.training.loop", "import wandb"),
        ("prefixkit.errors", "from prefixkit.cli import app"),
        ("prefixkit.cli.train", "from . import inspect"),
    ]:
        assert len(violations(module, source)) == 1, (module, source)


def test_what_is_allowed_is_not_reported() -> None:
    for module, source in [
        ("prefixkit.format.header", "import json\nfrom prefixkit.errors import FormatError\nimport blake3"),
        ("prefixkit.format.validate", "from prefixkit import __version__"),
        ("prefixkit.prefix", "import numpy\nfrom prefixkit.format import names"),
        ("prefixkit.methods.prefix_tuning", "import torch\nfrom prefixkit.injections import KeyValuePrefix"),
        ("prefixkit.cli.train", "from prefixkit.training.loop import train\nfrom prefixkit.cli import render"),
    ]:
        assert violations(module, source) == []
