"""Folders that onnxruntime-genai runs, in its own environment, against PyTorch."""

from __future__ import annotations

import json
import re
import shutil
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
from prefixkit.bridges.onnx_adapter import export_onnx_adapter, fitted
from prefixkit.cli import run
from prefixkit.errors import BackboneError, ConfigError, FormatError, InputError, ParityError
from prefixkit.format.manifest import Positions, TaskRecord
from prefixkit.prefix import Prefix, save
from prefixkit.task import encode_prompt, load_task, load_tokenizer, render_chat
from tests.bridges import folders
from tests.bridges.folders import EFFECT, STEPS, TOLERANCE, in_pytorch, prefixes, texts
from tests.exported import LENGTH, TASK, backbone, exported
from tests.small_tokenizer import CHAT_TEMPLATE, END, write_folder

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


def readme_code(folder: Path) -> str:
    code: str = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    return code


def test_the_code_in_the_readme_runs() -> None:
    folder = folders.genai("llama")
    asked = {"input": "Blue Spice <pub>"}
    more = f"print([int(id_) for id_ in encode(**{asked})])"
    *written, encoded = in_genai("-c", f"{readme_code(folder)}\n{more}", cwd=folder).splitlines()
    assert json.loads(encoded) == encode_prompt(TASK, load_tokenizer(backbone("llama")), asked)
    assert len(written) == 2


TASKS: dict[str, tuple[TaskRecord | None, dict[str, str]]] = {
    "two fields": (
        replace(TASK, input_template="{premise} and {hypothesis} :", separator="\n"),
        {"premise": "Blue Spice", "hypothesis": "The Eagle"},
    ),
    "braces": (replace(TASK, input_template="{{{input}}} {{input}}", bos="after"), {"input": "a {pub}"}),
    "special": (replace(TASK, input_template=f"<|im_start|>{{class}}{END}'\\"), {"class": 'it\'s {{END}} "so"'}),
    "long": (TASK, {"input": "Blue Spice " * 40}),
    "none": (None, {"input": "Blue Spice"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose README.md may be changed."""
    copied = tmp_path_factory.mktemp("genai") / "folder"
    shutil.copytree(folders.genai("llama"), copied)
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    return write_folder(copied, tokenizer_config=settings)


def encoded(folder: Path, task: TaskRecord | None, fields: list[dict[str, str]]) -> tuple[list[list[int]], int]:
    """What `encode` of the README for `task` makes of `fields`, and how many lines the code prints itself."""
    prefix = prefixes("llama")["say"]
    prefix = Prefix(replace(prefix.manifest, task=task), prefix.tensors)
    tokenizer = load_tokenizer(folder)
    text = readme(prefix, "say", special_tokens(prefix, folder), "float32", tokenizer)
    (folder / "README.md").write_text(text, encoding="utf-8")
    more = f"print([[int(id_) for id_ in encode(**one)] for one in {fields}])"
    *printed, ids = in_genai("-c", f"{readme_code(folder)}\n{more}", cwd=folder).splitlines()
    return json.loads(ids), len(printed)


@pytest.mark.parametrize("name", TASKS)
def test_the_readme_encodes_every_task_as_it_was_trained(name: str, folder: Path) -> None:
    task, fields = TASKS[name]
    tokenizer = load_tokenizer(folder)
    (ids,), printed = encoded(folder, task, [fields])
    expected = tokenizer.encode_text(fields["input"]) if task is None else encode_prompt(task, tokenizer, fields)
    assert ids == expected
    assert printed == 2


def test_text_in_the_readme_spells_no_special_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    said = f"a {END} b<|im_end|><s>"
    (ids,), _ = encoded(folder, replace(TASK, separator="\n"), [{"input": said}])
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == f"name : {said}\n"


def test_the_readme_of_a_chat_task_takes_rendered_conversations(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    task = load_task("chat", tokenizer, max_length=64)
    messages = [{"role": "user", "content": "Blue Spice"}]
    (ids,), printed = encoded(folder, task, [{"rendered": render_chat(tokenizer, messages)}])
    assert ids == encode_prompt(task, tokenizer, {"messages": messages})
    assert printed == 2
    text = (folder / "README.md").read_text()
    assert "genai's own `apply_chat_template` trims no blocks" in text
    assert "apply_chat_template(messages, tokenize=False, add_generation_prompt=True)" in text


def test_the_readme_says_what_else_a_folder_needs(folder: Path) -> None:
    prefix = prefixes("llama")["say"]
    tokens = special_tokens(prefix, folder)
    text = readme(prefix, "say", tokens, "float16", load_tokenizer(folder))
    assert "--onnx-adapter OTHER --dtype float16" in text
    assert "The code runs inside this folder" in text
    text = readme(with_task(prefix, None), "say", tokens, "float16", load_tokenizer(folder))
    assert "states no task" in text


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
    def wrong(prefix: Prefix, dtype: str) -> Any:
        return {name: array * 1.01 for name, array in fitted(prefix, dtype)[0].items()}, ()

    graph, prefix = folders.genai("gpt2") / "model.onnx", prefixes("gpt2")["say"]
    genai.check_adapter(graph, prefix, "float32")
    monkeypatch.setattr(genai, "fitted", wrong)
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
    with pytest.raises(ConfigError, match="dtype: expected float32 or float16; found 'int8'"):
        genai.export_genai(prefix, tmp_path / "out", backbone=str(backbone("gpt2")), dtype="int8")
    large = Prefix(prefix.manifest, {name: array * 1e6 for name, array in prefix.tensors.items()})
    with pytest.raises(FormatError, match=r"for float16; found .*; use --dtype float32, for graph and adapter"):
        genai.export_genai(large, tmp_path / "out", backbone=str(backbone("gpt2")), dtype="float16")
    (tmp_path / "mine" / "prefixkit.json").write_text('{"runtime": "OpenVINO"}')
    with pytest.raises(InputError, match="expected a new folder or one for onnxruntime-genai; found one for OpenVINO"):
        genai.export_genai(prefix, tmp_path / "mine", backbone=str(backbone("gpt2")))
    assert len(list((tmp_path / "mine").iterdir())) == 2


def test_adapters_that_users_put_there_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def copied(prefix: Prefix, backbone: str, out_dir: Path, **options: str) -> None:
        shutil.copytree(exported("gpt2").folder, out_dir)

    monkeypatch.setattr("prefixkit.export.onnx.export_onnx", copied)
    both, output = prefixes("gpt2"), tmp_path / "g"
    shutil.copytree(folders.genai("gpt2"), output)
    mine = (output / "adapters" / "other.onnx_adapter").read_bytes()
    done = genai.export_genai(both["say"], str(output), backbone=str(backbone("gpt2")))
    assert done.next.endswith("run in that folder; kept beside say: other")
    assert sorted(path.name for path in (output / "adapters").iterdir()) == ["other.onnx_adapter", "say.onnx_adapter"]
    assert (output / "adapters" / "other.onnx_adapter").read_bytes() == mine
    assert "run in that folder" in done.next


def test_adapters_that_would_not_fit_are_not_deleted(tmp_path: Path) -> None:
    output = tmp_path / "g"
    shutil.copytree(folders.genai("gpt2"), output)
    put = output / "adapters" / "put.onnx_adapter"
    for make, told in (
        (lambda: put.write_text("Buy milk."), "found another file; move it away"),
        (lambda: export_onnx_adapter(prefixes("llama")["say"], put), r"found one for \d+ in float32"),
        (lambda: export_onnx_adapter(prefixes("gpt2")["say"], put, dtype="float16"), r"found one for \d+ in float16"),
    ):
        make()
        before = put.read_bytes()
        with pytest.raises(InputError, match=rf"put.onnx_adapter: expected an adapter for model version \d+ .*{told}"):
            genai.export_genai(prefixes("gpt2")["say"], output, backbone=str(backbone("gpt2")))
        assert put.read_bytes() == before


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
