"""Folders that onnxruntime-genai runs, in its own environment, against PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixkit.bridges import genai
from prefixkit.bridges.genai_config import special_tokens
from prefixkit.bridges.genai_readme import readme
from prefixkit.bridges.onnx_adapter import inputs
from prefixkit.cli import run
from prefixkit.errors import BackboneError, FormatError, InputError, ParityError
from prefixkit.format.manifest import Positions
from prefixkit.prefix import Prefix, save
from prefixkit.task import encode_prompt, load_tokenizer
from tests.bridges import folders
from tests.bridges.folders import EFFECT, STEPS, TOLERANCE, in_pytorch, prefixes, texts
from tests.exported import LENGTH, TASK, backbone
from tests.small_tokenizer import END, write_folder

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-genai" / "bin" / "python"
RUNNER = Path(__file__).with_name("genai_runner.py")
FAMILIES = ("gpt2", "llama")
NAMES: tuple[str | None, ...] = (None, "say", "other")


def in_genai(*arguments: str, given: str = "", cwd: Path = ROOT) -> str:
    """What a program prints there; tests/install_runtimes makes that environment."""
    done = subprocess.run([PYTHON, *arguments], input=given, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def request(rows: list[list[int]], adapter: str | None, after: list[int] | None = None) -> dict[str, Any]:
    return {"rows": rows, "adapter": adapter, "steps": STEPS, "after": after}


@cache
def answers(family: str) -> list[dict[str, Any]]:
    """A batch with each of NAMES, and one row that was rewound, in one process and one model."""
    requests = [request(texts(), name) for name in NAMES] + [request(texts()[:1], "say", texts()[1])]
    told = in_genai(str(RUNNER), str(folders.genai(family)), given=json.dumps(requests))
    parsed: list[dict[str, Any]] = json.loads(told)
    return parsed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_computes_what_pytorch_computes(family: str, name: str | None) -> None:
    answer = answers(family)[NAMES.index(name)]
    prefix = None if name is None else prefixes(family)[name]
    for row, text in enumerate(texts()):
        tokens, expected = in_pytorch(family, prefix, text)
        found = np.concatenate([answer["prompt"][row][: len(text) - 1], [step[row][0] for step in answer["steps"]]])
        assert np.abs(found - expected).max() <= TOLERANCE
        assert answer["tokens"][row] == tokens
        if prefix is not None:
            bare_tokens, bare = in_pytorch(family, None, text)
            assert np.abs(found - bare)[: len(text)].max() > EFFECT
            assert answer["tokens"][row] != bare_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_two_prefixes_are_not_the_same(family: str) -> None:
    one, other = (np.array(answers(family)[NAMES.index(name)]["prompt"]) for name in ("say", "other"))
    assert np.abs(one - other).max() > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_rewinding_keeps_the_prefix(family: str) -> None:
    (answer,) = answers(family)[len(NAMES) :]
    text = [*texts()[0][:2], *texts()[1]]
    tokens, expected = in_pytorch(family, prefixes(family)["say"], text)
    assert np.abs(np.array(answer["prompt"][0]) - expected[2 : len(text)]).max() <= TOLERANCE
    assert answer["tokens"] == [tokens]


def test_the_folder_says_what_genai_asks() -> None:
    config = json.loads((folders.genai("llama") / "genai_config.json").read_text())
    tokenizer = load_tokenizer(backbone("llama"))
    assert config["model"]["context_length"] == 128 - LENGTH
    assert config["search"]["max_length"] == 128 - LENGTH
    assert config["model"]["eos_token_id"] == [tokenizer.token_id(END)]
    # The task's prompts end with that token, and genai would take it for padding.
    assert TASK.separator == END
    assert config["model"]["pad_token_id"] == tokenizer.token_id("<s>")
    assert config["model"]["decoder"]["num_key_value_heads"] == 2
    assert not list(folders.genai("llama").glob("portable*"))


def test_the_code_in_the_readme_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (folders.genai("llama") / "README.md").read_text(), re.DOTALL)[0]
    told = in_genai(
        "-c", f"{code}\nprint([int(id_) for id_ in encode('Blue Spice <pub>')])", cwd=folders.genai("llama")
    )
    *written, encoded = told.splitlines()
    fields = {"input": "Blue Spice <pub>"}
    assert json.loads(encoded) == encode_prompt(TASK, load_tokenizer(backbone("llama")), fields)
    assert len(written) == 2


def test_the_readme_of_other_tasks() -> None:
    prefix = prefixes("llama")["say"]
    tokens = special_tokens(prefix, backbone("llama"))
    for changes, told in (
        ({"bos": "after"}, f"return [{tokens.bos}, *tokenizer"),
        ({"chat_template_hash": "b3-v1:" + "0" * 64}, "tokenizer.apply_chat_template"),
        (None, "states no task"),
    ):
        text = readme(with_task(prefix, changes), "say", tokens, "float16", 7)
        assert told in text
        assert "--onnx-adapter OTHER --dtype float16" in text


def with_task(prefix: Prefix, changes: dict[str, Any] | None) -> Prefix:
    task = None if changes is None else replace(TASK, **changes)
    return Prefix(replace(prefix.manifest, task=task), prefix.tensors)


def test_special_tokens(tmp_path: Path) -> None:
    prefix = prefixes("llama")["say"]
    write_folder(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<s>"})
    named = load_tokenizer(tmp_path).token_id
    tokens = special_tokens(prefix, tmp_path)
    assert tokens.ends == (named(END), named("<|im_end|>"))
    assert (tokens.bos, tokens.pad) == (None, named("<s>"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="expected a token that ends a text; found none; give its tokenizer_config"):
        special_tokens(with_task(prefix, None), tmp_path)


def test_an_adapter_that_does_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(prefix: Prefix, dtype: str) -> dict[str, Any]:
        return {name: array * 1.01 for name, array in inputs(prefix, dtype).items()}

    graph, prefix = folders.genai("gpt2") / "model.onnx", prefixes("gpt2")["say"]
    genai.check_adapter(graph, prefix, "float32")
    monkeypatch.setattr(genai, "inputs", wrong)
    told = r"model.onnx: expected logits of an adapter within 1.0e-03 .* so nothing was written"
    with pytest.raises(ParityError, match=told):
        genai.check_adapter(graph, prefix, "float32")


def test_what_is_refused(tmp_path: Path) -> None:
    prefix = prefixes("gpt2")["say"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "genai_config.json").touch()
    with pytest.raises(InputError, match="found other files in it"):
        genai.export_genai(prefix, tmp_path / "mine", backbone=str(backbone("gpt2")))
    with pytest.raises(
        FormatError, match="text that starts at position 6, right behind the prefix, as onnxruntime-genai"
    ):
        genai.export_genai(elsewhere(prefix), tmp_path / "out", backbone=str(backbone("gpt2")))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def elsewhere(prefix: Prefix) -> Prefix:
    (record,) = prefix.manifest.injections
    moved = replace(record, positions=Positions(text_start=0, prefix_takes_positions=False))
    return Prefix(replace(prefix.manifest, injections=(moved,)), prefix.tensors)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(prefixes("gpt2")["say"], tmp_path / "p")
    arguments = ["export", "--genai", str(tmp_path / "p"), "-o", str(tmp_path / "out")]
    assert run(arguments) == 2
    assert "export --genai: expected --backbone" in capsys.readouterr().err
    assert run([*arguments, "--backbone", str(backbone("llama"))]) == 2
    assert not (tmp_path / "out").exists()
