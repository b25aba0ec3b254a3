from __future__ import annotations

from pathlib import Path

import pytest

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import TaskRecord
from prefixkit.task import load_task
from tests.small_tokenizer import END, small_tokenizer


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_e2e_takes_the_tokenizers_own_end() -> None:
    assert load_task("e2e", small_tokenizer(eos="<|im_end|>"), max_length=128) == TaskRecord(
        name="e2e",
        input_template=" {input} ",
        separator="<|im_end|>",
        target_template=" {target} ",
        bos="none",
        stop=("<|im_end|>",),
        max_length=128,
    )


def test_bos_follows_the_tokenizer() -> None:
    assert load_task("text", small_tokenizer(), max_length=9).bos == "none"
    assert load_task("text", small_tokenizer(adds_bos=True), max_length=9).bos == "after"


def test_file_with_every_key(tmp_path: Path) -> None:
    path = write(
        tmp_path / "quiz.toml",
        'input_template = "{question}{eos}"\nseparator = "A:"\ntarget_template = " {target}"\n'
        'stop = ["{eos}", "<|im_end|>"]\nbos = "before"\nmax_length = 64\n',
    )
    assert load_task(path, small_tokenizer(), max_length=128) == TaskRecord(
        name="quiz",
        input_template=f"{{question}}{END}",
        separator="A:",
        target_template=" {target}",
        bos="before",
        stop=(END, "<|im_end|>"),
        max_length=64,
    )


def test_file_fills_in_from_text(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "mine.toml", 'separator = " => "'), small_tokenizer(), max_length=128)
    assert (task.name, task.input_template, task.separator, task.stop) == ("mine", "{input}", " => ", (END,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seperator = "x"', "found 'seperator'; did you mean 'separator'?"),
        ("separator = 3", "expected separator = a string; found 3"),
        ('bos = "always"', "expected bos = .* found 'always'"),
        ('stop = "x"', "expected stop = a list of strings"),
        ("max_length = 0", "expected max_length from 1 to 128; found 0"),
        ("max_length = 129", "expected max_length from 1 to 128; found 129"),
        ("max_length = true", "expected max_length from 1 to 128; found True"),
        ('stop = ["two words"]', "expected exactly one token"),
        ("separator = ", "expected a TOML file; .*; write lines such as"),
        ("stop = []", r'expected at least one stop token; found stop = \[\]; write stop = \["{eos}"\]'),
        (
            'input_template = "Say it: "',
            "expected input_template with a field; found 'Say it: '; write a",
        ),
        ('input_template = "{{input}}"', "expected input_template with a field"),
    ],
)
def test_faulty_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(write(tmp_path / "mine.toml", text), small_tokenizer(), max_length=128)


def test_unknown_name_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found 'e2'; did you mean 'e2e'\?"):
        load_task("e2", small_tokenizer(), max_length=9)
    with pytest.raises(
        ConfigError,
        match="found 'summaries'; choose from text, continuation, e2e, classification, pair-classification, tagging",
    ):
        load_task("summaries", small_tokenizer(), max_length=9)
    with pytest.raises(ConfigError, match=r"absent\.toml: expected a task file; found no such file; check the path"):
        load_task(tmp_path / "absent.toml", small_tokenizer(), max_length=9)


def test_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a token for \{eos\}; found none"):
        load_task("text", small_tokenizer(eos=None), max_length=9)
