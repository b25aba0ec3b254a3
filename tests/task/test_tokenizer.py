from __future__ import annotations

from pathlib import Path

import pytest

from prefixkit.errors import BackboneError
from prefixkit.task import load_tokenizer
from tests.small_tokenizer import CHAT_TEMPLATE, END, small_backend, write_folder


def test_facts_of_the_tokenizer_config(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": END, "chat_template": CHAT_TEMPLATE, "model_max_length": 9}
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config=config))
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.eos, tokenizer.eos_id) == ("<s>", 1, END, 0)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": END}
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_ids_of_the_model_config_stand_in(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, config={"bos_token_id": 1, "eos_token_id": 2}, generation_config={"eos_token_id": [3, 0]}
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == ("<s>", "<|im_end|>", ("<|im_end|>", END))


def test_bos_that_the_tokenizer_denies_stays_denied(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tokenizer_config={"bos_token": None}, config={"bos_token_id": 0})
    assert load_tokenizer(folder).bos is None


def test_chat_template_beside_and_named(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": named})
    assert load_tokenizer(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("beside", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "beside"


def test_stored_padding_and_truncation_are_off(tmp_path: Path) -> None:
    backend = small_backend(adds_bos=True)
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    tokenizer = load_tokenizer(write_folder(tmp_path, backend))
    assert tokenizer.encode_text("ab cd ef") == small_backend().encode("ab cd ef").ids


def test_whether_the_model_expects_a_bos(tmp_path: Path) -> None:
    for adds in (False, True):
        folder = write_folder(tmp_path / str(adds), small_backend(adds_bos=adds), tokenizer_config={"bos_token": "<s>"})
        assert load_tokenizer(folder).adds_bos is adds


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"tokenizer\.json: expected the model's tokenizer; found no such file"):
        load_tokenizer(tmp_path)
    folder = write_folder(tmp_path, tokenizer_config=["a list"])
    with pytest.raises(BackboneError, match=r"tokenizer_config\.json: expected a JSON object; found a list"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(BackboneError, match=r"tokenizer_config\.json: expected a JSON object"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BackboneError, match=r"tokenizer\.json: expected a tokenizers JSON file"):
        load_tokenizer(folder)
