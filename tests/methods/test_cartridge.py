"""Cartridges: the start is the document's own first slots, the sink stays, and the teacher is the whole document."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prefixkit.errors import ConfigError
from prefixkit.methods.cartridge import Settings, make
from prefixkit.methods.method import Material
from prefixkit.methods.prefix_tuning import PrefixTuning
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap

TEXT = "name : blue | area : river\nname : mill | area : city\n"


def cartridge(folder: Path, text: str = TEXT, *, bos_id: int | None = None, **settings: object) -> PrefixTuning:
    path = folder / "document.txt"
    path.write_text(text)
    material = Material(
        backbone=wrap(tiny("gpt2")),
        words=[],
        tokenize=lambda words: [ord(letter) for letter in words],
        parent=lambda file: pytest.fail(file),
        bos_id=bos_id,
    )
    return make(Settings(**{"length": 6, "document": str(path), **settings}), material)


def test_it_starts_as_the_first_slots_of_the_document(tmp_path: Path) -> None:
    made, teacher = cartridge(tmp_path)(), wrap(tiny("gpt2")).key_values_of([ord(letter) for letter in TEXT])
    first = wrap(tiny("gpt2")).key_values_of([ord(letter) for letter in TEXT[:6]])
    for one, other in zip([*made.keys, *made.values], [*first.keys, *first.values], strict=True):
        assert (one - other).abs().max() <= 1e-6
    assert (made.length, made.frozen_slots, made.positions.text_start) == (6, 1, 6)
    assert torch.equal(cartridge(tmp_path).teacher.keys[1], teacher.keys[1])


def test_a_promised_bos_is_before_the_document(tmp_path: Path) -> None:
    with_bos = cartridge(tmp_path, bos_id=3)
    assert with_bos.teacher.length == len(TEXT) + 1
    alone = wrap(tiny("gpt2")).key_values_of([3])
    assert (with_bos.teacher.keys[1][:, 0] - alone.keys[1][:, 0]).abs().max() <= 1e-6


def test_the_sink_stays_while_the_rest_learns(tmp_path: Path) -> None:
    method = cartridge(tmp_path, frozen_slots=2)
    before = method.fold()
    sum(key.pow(2).sum() for key in method().keys).backward()
    torch.optim.AdamW(method.parameters(), lr=0.1, weight_decay=0.5).step()
    for old, new in zip(before.keys, method.fold().keys, strict=True):
        assert torch.equal(new[:, :2], old[:, :2])
        assert (new[:, 2:] != old[:, 2:]).all()


def test_the_teacher_is_no_parameter_and_no_state(tmp_path: Path) -> None:
    method = cartridge(tmp_path)
    assert set(method.state_dict()) == {"frozen", "prefix.prefix"}


def test_documents_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    for text, settings, message in (
        ("short", {}, "expected a document longer than 6 tokens; found one of 5 tokens; use --length 1, or"),
        ("x" * 200, {}, "expected a text of fewer than 128 tokens, which the backbone can read; found 200"),
        (TEXT, {"document": ""}, "method.document: expected the text file to stand for; found none; add --set"),
        (TEXT, {"document": str(tmp_path / "none")}, "expected a text file; found no such file; check the path"),
        (TEXT, {"init": "zeros"}, "--init: expected document or random or prefix:FILE; found 'zeros'"),
    ):
        with pytest.raises(ConfigError, match=message):
            cartridge(tmp_path, text, **settings)
