"""Cartridges, there and back: the file that their own package writes, and files that would run code."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from prefixkit.backbones.attach import attach
from prefixkit.bridges.cartridges import export_cartridge, import_cartridge
from prefixkit.cli import run
from prefixkit.errors import BackboneError, FormatError, InputError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.prefix import Prefix, load, save
from tests.encoder_decoders import folder_of
from tests.prefixes import small_prefix

Folder = Callable[..., Path]
LAYERS, HEADS, DIM = 2, 2, 16
LENGTH = 16
TEXT = torch.arange(40, 52)[None]


def lists(
    frozen: int = 1, length: int = LENGTH, dtype: torch.dtype = torch.float32, old: bool = False
) -> dict[str, Any]:
    """What their `TrainableCache.save` gives to `torch.save`."""
    made = torch.Generator().manual_seed(5)

    def rows(count: int, trains: bool) -> nn.ParameterList:
        tensors = (torch.randn(1, HEADS, count, DIM, generator=made).to(dtype) * 1.5 for _ in range(LAYERS))
        return nn.ParameterList([nn.Parameter(one, requires_grad=trains) for one in tensors])

    name = "fixed" if old else "frozen"
    return {
        "trainable_keys": rows(length - frozen, True),
        "trainable_values": rows(length - frozen, True),
        f"{name}_keys": rows(frozen, False),
        f"{name}_values": rows(frozen, False),
    }


def cartridge(path: Path, stored: Any = None) -> Path:
    torch.save(lists() if stored is None else stored, path)
    return path


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("old", [False, True])
def test_a_cartridge_is_what_transformers_computes_with_it(old: bool, backbone_folder: Folder, tmp_path: Path) -> None:
    folder, stored = backbone_folder("llama"), lists(frozen=3, old=old)
    prefix = import_cartridge(cartridge(tmp_path / "c.pt", stored), backbone=str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, first = DynamicCache(), "fixed" if old else "frozen"
    for layer in range(LAYERS):
        pair = [
            torch.cat([stored[f"{first}_{kind}"][layer], stored[f"trainable_{kind}"][layer]], dim=2).detach()
            for kind in ("keys", "values")
        ]
        cache.update(*pair, layer)
    mask = torch.ones(1, LENGTH + TEXT.shape[1], dtype=torch.long)
    expected = logits(model, input_ids=TEXT, attention_mask=mask, past_key_values=cache)
    bare = logits(model, input_ids=TEXT)
    found = logits(attach(model, prefix), input_ids=TEXT)
    assert (found - expected).abs().max() <= 1e-4
    assert (found - bare).abs().max() > 1
    assert prefix.manifest.injections[0].frozen_slots == 3
    assert prefix.manifest.provenance.config == {"imported_from": "cartridges"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("frozen", [1, 4, LENGTH])
def test_there_and_back(frozen: int, dtype: torch.dtype, backbone_folder: Folder, tmp_path: Path) -> None:
    source, back, folder = tmp_path / "c.pt", tmp_path / "back.pt", str(backbone_folder("llama"))
    cartridge(source, stored := lists(frozen, dtype=dtype))
    prefix = save(import_cartridge(source, backbone=folder), tmp_path / "prefix")
    carried = export_cartridge(load(tmp_path / "prefix"), back)
    assert carried.lost == ()
    with torch.serialization.safe_globals([nn.ParameterList]):
        found = torch.load(back, weights_only=True)
    for name, tensors in stored.items():
        for one, other in zip(found[name], tensors, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad
        older = found[name.replace("frozen", "fixed")]
        assert all(one.data_ptr() == other.data_ptr() for one, other in zip(found[name], older, strict=True))
    again = save(import_cartridge(back, backbone=folder), tmp_path / "again")
    assert again.manifest.content == prefix.manifest.content


def test_the_same_prefix_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one.pt", "other.pt"):
        export_cartridge(small_prefix(seed=1, length=16), tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def changed(prefix: Prefix, **changes: Any) -> Prefix:
    (record,) = prefix.manifest.injections
    return Prefix(replace(prefix.manifest, injections=(replace(record, **changes),)), prefix.tensors)


def test_what_gets_lost_is_told(tmp_path: Path) -> None:
    frozen = changed(small_prefix(length=16), frozen_slots=2)
    assert export_cartridge(frozen, tmp_path / "c.pt").lost == ()
    (told,) = export_cartridge(changed(small_prefix(length=19), frozen_slots=1), tmp_path / "c.pt").lost
    assert "pages of 16 slots and would drop the last 3 of 19" in told
    (told,) = export_cartridge(small_prefix(length=16), tmp_path / "c.pt").lost
    assert "slot 0 is written as one" in told
    with torch.serialization.safe_globals([nn.ParameterList]):
        assert torch.load(tmp_path / "c.pt", weights_only=True)["fixed_keys"][0].shape == (1, 2, 1, 4)


def test_nothing_frozen_may_be_no_list(backbone_folder: Folder, tmp_path: Path) -> None:
    for empty in ([], nn.ParameterList()):
        stored = {**lists(frozen=0), "frozen_keys": empty, "frozen_values": empty}
        prefix = import_cartridge(cartridge(tmp_path / "c.pt", stored), backbone=str(backbone_folder("llama")))
        assert (prefix.manifest.injections[0].length, prefix.manifest.injections[0].frozen_slots) == (LENGTH, 0)


class Harm:
    """What would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def refusal(path: Path, backbone: str | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        import_cartridge(path, backbone=backbone)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    for stored in (Harm(harm), {**lists(), "more": Harm(harm)}, {**lists(), "frozen_keys": [Harm(harm)]}):
        told = refusal(cartridge(tmp_path / "c.pt", stored))
        assert "expected lists of tensors and nothing else; found a call of io.open" in told
        assert not harm.exists()
    torch.load(tmp_path / "c.pt", weights_only=False)["frozen_keys"][0].close()
    assert harm.exists(), "the file does no harm to anybody: the test proves nothing"


def test_a_module_with_hooks_is_refused(tmp_path: Path) -> None:
    stored = lists()
    stored["frozen_keys"].register_forward_hook(print)
    assert "found a call of builtins.print" in refusal(cartridge(tmp_path / "c.pt", stored))
    assert "found a call of torch.nn.modules.linear.Linear" in refusal(cartridge(tmp_path / "c.pt", nn.Linear(1, 1)))


def test_files_that_are_no_cartridge(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    assert "expected the .pt file of a cartridge; found nothing; check the path" in refusal(path)
    assert "found a folder" in refusal(tmp_path)
    path.write_bytes(b"no archive")
    assert "found another file" in refusal(path)
    torch.save(lists(), path, _use_new_zipfile_serialization=False)
    assert "found another file" in refusal(path)
    whole = cartridge(path).read_bytes()
    path.write_bytes(whole[:-9])
    assert "zip archive" in refusal(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert "found a compressed one" in refusal(path)
    with zipfile.ZipFile(path, "w") as empty:
        empty.writestr("archive/letter.txt", "hello")
    assert "found a file that cannot be read" in refusal(path)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in lists().items() if key != name}


def wide() -> dict[str, Any]:
    one = torch.zeros(1).as_strided((1, HEADS, 10**9, DIM), (0, 0, 0, 0))
    return {**lists(), "trainable_keys": [one] * LAYERS}


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ([1, 2], "expected a dict of a cartridge's lists; found a list"),
        ({}, "expected frozen_keys or fixed_keys; found nothing"),
        (without("trainable_values"), "expected trainable_values; found frozen_keys, frozen_values, trainable_keys"),
        ({**lists(), "frozen_keys": 3}, "expected frozen_keys, a list of tensors; found a int"),
        ({**lists(), "frozen_keys": torch.zeros(1).expand(2)}, "a list of tensors; found a Tensor"),
        ({**lists(), "frozen_keys": ["a", "b"]}, "expected frozen_keys, a list of tensors; found a list"),
        ({**lists(), "frozen_keys": [torch.zeros(HEADS, 1, DIM)] * 2}, "found [2, 1, 16] in float32"),
        ({**lists(), "frozen_keys": [torch.zeros(1, HEADS, 1, DIM).double()] * 2}, "found [1, 2, 1, 16] in float64"),
        (wide(), "found [1, 2, 1000000000, 16] in float32"),
        (
            {**lists(), "frozen_keys": [torch.zeros(1, HEADS, 1, DIM)]},
            "1 frozen_keys, 2 frozen_values, 2 trainable_keys",
        ),
        (
            {**lists(), "trainable_keys": lists(2)["trainable_keys"]},
            "as many trainable slots in every layer; found 14 and",
        ),
        ({**lists(), "frozen_keys": [torch.zeros(1, 3, 1, DIM)] * 2}, "found 2 in float32 and 3 in float32"),
        (lists(dtype=torch.float16) | {"frozen_keys": lists()["frozen_keys"]}, "found 2 in float16 and 2 in float32"),
        (lists(0, 0), "expected at least one slot; found none"),
    ],
)
def test_contents_that_are_no_cartridge(stored: Any, told: str, tmp_path: Path) -> None:
    assert told in refusal(cartridge(tmp_path / "c.pt", stored))


def unmeasured() -> dict[str, Tensor]:
    """Tensors that cannot be asked for what they take, or that numpy cannot have."""
    rows = torch.ones(1, HEADS, LENGTH - 1, DIM)
    return {
        "sparse": rows.to_sparse(),
        "meta": rows.to("meta"),
        "nested": torch.nested.nested_tensor([rows[0], rows[0, :, :3]]),
        "negated": torch.complex(rows, rows).conj().imag,
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "meta", "nested", "negated"])
def test_tensors_that_are_no_plain_numbers(kind: str, tmp_path: Path) -> None:
    path = cartridge(tmp_path / "c.pt", {**lists(), "trainable_keys": [unmeasured()[kind]] * LAYERS})
    told = "expected trainable_keys, a list of tensors; found one that is sparse, nested or without numbers; Trainable"
    assert told in refusal(path)


def test_numbers_and_lengths_that_no_prefix_has(backbone_folder: Folder, tmp_path: Path) -> None:
    folder, stored = str(backbone_folder("llama")), lists()
    with torch.no_grad():
        stored["trainable_values"][1][0, 0, 0, 0] = torch.inf
    path = cartridge(tmp_path / "c.pt", stored)
    told = f"{path}: expected finite numbers for decoder.self.layers.1.value; found NaN or Infinity"
    assert refusal(path, folder).startswith(told)
    with pytest.raises(MismatchError, match=r"c\.pt: expected fewer than the 128 positions of .*; found 128; give"):
        import_cartridge(cartridge(path, lists(length=128)), backbone=folder)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    t5 = folder_of("t5", tmp_path / "t5")
    with pytest.raises(MismatchError, match=r"c\.pt: expected a decoder as backbone; found an encoder-decoder; give"):
        import_cartridge(cartridge(tmp_path / "c.pt"), backbone=t5)


def test_paths_may_be_text(backbone_folder: Folder, tmp_path: Path) -> None:
    prefix = import_cartridge(str(cartridge(tmp_path / "c.pt")), backbone=backbone_folder("llama"))
    assert export_cartridge(prefix, str(tmp_path / "back.pt")).output == tmp_path / "back.pt"


def test_a_backbone_is_needed_and_must_fit(backbone_folder: Folder, tmp_path: Path) -> None:
    path = cartridge(tmp_path / "c.pt")
    with pytest.raises(BackboneError, match="found a file that names none; give it with --backbone"):
        import_cartridge(path)
    with pytest.raises(MismatchError, match=r"2 layers of .* \(4, 16, 16\); found 2 of \(2, 16, 16\)"):
        import_cartridge(path, backbone=str(backbone_folder("gpt2")))


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    prefix = small_prefix(length=16)
    uneven = {**prefix.tensors, "decoder.self.layers.1.key": np.zeros((2, 16, 8), np.float32)}
    with pytest.raises(FormatError, match=r"expected one shape for all keys and values.*\(2, 16, 4\) and \(2, 16, 8\)"):
        export_cartridge(Prefix(prefix.manifest, uneven), tmp_path / "c.pt")
    slots, moved = changed(prefix, placement="slots"), changed(prefix, positions=Positions(text_start=0))
    prompt = {"kind": "embedding_prompt", "attention": None}
    for other, told in (
        (slots, "some in slots of the text; see `prefixkit runtimes`"),
        (moved, "text that starts at 0; see `prefixkit runtimes`"),
        (changed(prefix, positions=None), "no positions; see"),
        (changed(prefix, **prompt, placement="prepend"), "embedding_prompt; `prefixkit export --onnx` folds a prompt"),
        (changed(prefix, **prompt, placement="slots"), "embedding_prompt in slots of the text; see `prefixkit run"),
    ):
        with pytest.raises(FormatError, match=f"^prefix for tiny: expected .*; found {told}"):
            export_cartridge(other, tmp_path / "c.pt")
    with pytest.raises(InputError, match="expected an existing folder"):
        export_cartridge(prefix, tmp_path / "none" / "c.pt")
    assert list(tmp_path.iterdir()) == []


def test_commands(backbone_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, prefix, back = cartridge(tmp_path / "c.pt"), str(tmp_path / "prefix"), tmp_path / "back.pt"
    folder = str(backbone_folder("llama"))
    assert run(["import", "--cartridges", str(source), "-o", prefix, "--backbone", folder]) == 0
    assert run(["export", "--cartridges", prefix, "-o", str(back)]) == 0
    captured = capfd.readouterr()
    assert f'next: cache = cartridges.cache.TrainableCache.from_pretrained("{back}")' in captured.out
    assert "warning" not in captured.err
    short = save(small_prefix(length=3, dtype=ml_dtypes.bfloat16), tmp_path / "short")
    assert short.manifest.content
    assert run(["export", "--cartridges", str(tmp_path / "short"), "-o", str(back)]) == 0
    told = capfd.readouterr().err
    assert told.count("warning: ") == 3
    assert "tokasaurus is not told how to ask" in told
