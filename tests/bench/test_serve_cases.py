"""The serving measurements as a program: every kind of case runs, on a tiny model, and compares equal work."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import serve, serving_speed
from tests.bench.genai_peer import Genai, NoGenaiError
from tests.bench.serving_alone import resident_peak
from tests.bench.serving_contenders import OURS, PEFT, TRANSFORMERS, build_all
from tests.bench.serving_ours import OurEngine
from tests.bench.serving_roof import ROOF, key_value_bytes, weight_bytes
from tests.bench.serving_work import Effort, Turn, UnequalError, Work
from tests.bench.shapes import LLAMA_100M
from tests.bench.test_cases import check
from tests.exported import backbone, exported

# PEFT asks transformers in words that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = {
    *("cpu-gpt2-15m-b1", "cpu-gpt2-15m-b8", "cpu-llama-100m-b1", "cpu-llama-100m-b8", "cpu-shared-p2048-b8", "swap"),
    *("h200-qwen06-b1-p20", "h200-qwen06-b32-p20", "h200-qwen06-b1-p2048", "h200-qwen06-b32-p2048"),
    *("h200-qwen17-b1-p20", "h200-8b-b1-p20", "h200-prefill-b32", "h200-shared-p2048-b32", "h200-ttft-p2048-b32"),
}
ONCE = Effort(rounds=1, alone=0)
GENAI = """
import numpy

class Model:
    def __init__(self, folder): pass

class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, **options): assert options["batch_size"] == 2

class Generator:
    def __init__(self, model, params): pass
    def append_tokens(self, ids): self.ids = ids
    def generate_next_token(self): self.ids = numpy.concatenate([self.ids, self.ids[:, -1:] + 1], axis=1)
    def get_next_tokens(self): return self.ids[:, -1]
    def get_sequence(self, row): return self.ids[row]
"""
BUILDER = """
import json, pathlib, sys

if "llama" not in sys.argv[sys.argv.index("-i") + 1]:
    raise NotImplementedError("no such family")
folder = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
folder.mkdir()
model = {"vocab_size": 64, "eos_token_id": 0, "decoder": {"session_options": {}}}
(folder / "genai_config.json").write_text(json.dumps({"model": model}))
"""


def work(**changes: Any) -> Work:
    """A few tokens of a tiny model."""
    folders = [str(backbone("llama")), *(str(exported("llama", **how).folder) for how in ({"target": "cuda"}, {}))]
    return replace(Work(*folders, rows=3, length=6, prompt=5, new=4, threads=1), **changes)


def test_all_are_there() -> None:
    assert set(serve.CASES) == NAMES


@pytest.mark.parametrize("name", ["swap", "h200-prefill-b32", "h200-shared-p2048-b32", "h200-ttft-p2048-b32"])
def test_a_case_of_its_own_kind_runs(name: str) -> None:
    rows = serve.CASES[name].measure(name, work(new=16), ONCE, lambda message: None)
    assert len(rows) >= 2
    check(rows, name)


def test_decoding_is_compared_with_every_peer_the_roof_and_the_bar() -> None:
    told: list[str] = []
    rows = serve.CASES["h200-qwen17-b1-p20"].measure("h200-qwen17-b1-p20", work(), ONCE, told.append)
    check(rows, "h200-qwen17-b1-p20")
    peers = {*OURS[1:], TRANSFORMERS, PEFT}
    assert {row.peer_name for row in rows if row.metric == serving_speed.PER_TOKEN} == {*peers, ROOF, "the bar"}
    assert {row.peer_name for row in rows if row.metric == serving_speed.FIRST} == peers
    assert "onnxruntime-genai: left out, there is no --genai-python" in told


def test_other_tokens_are_no_comparison() -> None:
    given = work(rows=1)
    everyone = build_all(given, None, lambda message: None)

    class Another(OurEngine):
        def write(self, *_: Any, **__: Any) -> Turn:
            return Turn(1.0, 2.0, [[1, 2, 3, 4]])

    with pytest.raises(UnequalError, match=r"case: not the same work: ours writes \[1, 2, 3, 4\]"):
        serving_speed.refuse_other_tokens("case", given, {**everyone, "ours": Another(given)}, lambda message: None)
    with pytest.raises(UnequalError, match="case: a prefix changes nothing of what ours writes"):
        serving_speed.refuse_unchanged("case", "ours", [[1, 2]], [[1, 2]])


def test_times_of_a_turn() -> None:
    turn = Turn(first=0.1, total=0.4, tokens=[[1, 2, 3, 4], [5, 6, 7, 8]])
    assert turn.per_token == pytest.approx(100)
    assert turn.rate == pytest.approx(20)


def test_the_roof_counts_what_a_pass_reads() -> None:
    given = work()
    weights = sum(each.numel() for each in serve_model(given).parameters())
    unread = serve_model(given).get_input_embeddings().weight.numel()
    tied = serve_model(given).config.tie_word_embeddings
    assert weight_bytes(given) == 4 * (weights if tied else weights - unread)
    assert weight_bytes(replace(given, dtype="bfloat16")) == weight_bytes(given) // 2
    layers = given.identity.stacks["decoder"]
    assert key_value_bytes(given) == 4 * 3 * (6 + 5 + 2) * sum(layer.kv_heads * 2 * layer.key_dim for layer in layers)


def serve_model(given: Work) -> Any:
    from tests.bench.serving_peers import load_model

    return load_model(given)


def test_the_large_shape_has_about_a_hundred_million_weights() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    own = dict(LLAMA_100M)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(own.pop("model_type"), **own))
    assert 95e6 < sum(each.numel() for each in model.parameters()) < 105e6


@pytest.fixture
def genai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package, which counts on from the last token."""
    package = tmp_path / "packages" / "onnxruntime_genai"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text(GENAI)
    (package / "models" / "builder.py").write_text(BUILDER)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return tmp_path


def test_onnxruntime_genai_writes_in_a_process_of_its_own(genai: Path) -> None:
    one = Genai(work(rows=2, buffered=str(shutil.copytree(work().buffered, genai / "buffered"))), sys.executable)
    turn = one.write([(5, 6), (7, 8)])
    assert turn.tokens == [[7, 8, 9, 10], [9, 10, 11, 12]]
    assert 0 < turn.first <= turn.total
    assert 0 < one.peak < 10 * resident_peak()
    assert {len(prompt) for prompt in one.prompts()} == {6 + 5}
    config = json.loads((genai / "genai-cpu" / "genai_config.json").read_text())["model"]
    assert config["decoder"]["session_options"]["intra_op_num_threads"] == 1
    one.close()
    assert one.process.returncode == 0


def test_a_family_that_its_builder_does_not_know_is_left_out(genai: Path) -> None:
    other = work(backbone="gpt2", buffered=str(genai / "buffered"))
    with pytest.raises(NoGenaiError, match="NotImplementedError: no such family"):
        Genai(other, sys.executable)


def test_a_case_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = Namespace(quick=False, device=None, backbones=tmp_path)
    assert serve.why_not("cpu-llama-100m-b1", options) is None
    assert serve.why_not("swap", options) is None
    assert serve.why_not("h200-8b-b1-p20", options) == "there is no CUDA device here"
    assert "there is no" in str(serve.why_not("cpu-gpt2-15m-b1", options))
    assert serve.why_not("swap", Namespace(**{**vars(options), "device": "cuda"})) == "there is no CUDA device here"
    assert serve.why_not("h200-8b-b1-p20", Namespace(**{**vars(options), "quick": True})) is None
