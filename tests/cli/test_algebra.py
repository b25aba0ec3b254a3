"""`compose`, `slice`, `average`, `cast` and `diff` from the outside: what they write, say and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefixkit.cli import run
from prefixkit.prefix import Prefix, load, save
from tests.prefixes import small_prefix

Folder = Callable[..., Path]
Out = pytest.CaptureFixture[str]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    for seed, path in enumerate(paths):
        save(small_prefix(seed=seed, length=4), path)
    return paths


def test_compose_and_slice_back(files: tuple[str, str], tmp_path: Path, capsys: Out) -> None:
    first, second = files
    both, front, back = (str(tmp_path / name) for name in ("ab", "front", "back"))
    assert run(["compose", first, second, "-o", both]) == 0
    told = capsys.readouterr().out
    assert f"wrote {both} (8 slots) from {first}, {second}" in told
    assert "note: keys as they are" in told
    assert f"next: prefixkit inspect {both}" in told
    assert run(["slice", both, ":4", "-o", front]) == 0
    assert run(["slice", both, "-4:", "-o", back]) == 0
    for path, original in ((front, first), (back, second)):
        for name, array in load(original).tensors.items():
            assert load(path).tensors[name].tobytes() == array.tobytes()
    capsys.readouterr()
    assert run(["inspect", both]) == 0
    shown = capsys.readouterr().out
    assert shown.count("parent") == 2
    assert '"operation": "compose"' in shown


def test_the_next_command_can_be_pasted(files: tuple[str, str], tmp_path: Path, capsys: Out) -> None:
    both = str(tmp_path / "a b")
    assert run(["compose", *files, "-o", both]) == 0
    assert f"next: prefixkit inspect '{both}'" in capsys.readouterr().out


def test_moving_keys_with_a_backbone(backbone_folder: Folder, tmp_path: Path, capsys: Out) -> None:
    folder, text, one, both = (
        str(backbone_folder("llama")),
        tmp_path / "t.txt",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    )
    text.write_text("blue spice is near the river")
    assert run(["capture", "--backbone", folder, "--text", str(text), "-o", one]) == 0
    assert run(["compose", one, one, "-o", both]) == 2
    error = capsys.readouterr().err
    assert "expected the backbone, to move them by" in error
    assert "found none; add --backbone with" in error
    assert run(["compose", one, one, "-o", both, "--backbone", str(backbone_folder("llama", 1))]) == 2
    assert "weights hash" in capsys.readouterr().err
    assert not Path(both).exists()
    assert run(["compose", one, one, "-o", both, "--backbone", folder]) == 0
    assert "note: keys turned to the positions where they now stand" in capsys.readouterr().out
    length, key = load(one).manifest.injections[0].length, "decoder.self.layers.1.key"
    assert length is not None
    assert np.abs(load(both).tensors[key][:, length:] - load(one).tensors[key]).max() > 1
    back = str(tmp_path / "c")
    assert run(["slice", both, f"{length}:", "-o", back, "--backbone", folder]) == 0
    assert np.abs(load(back).tensors[key] - load(one).tensors[key]).max() <= 5e-6


def test_a_backbone_is_compared_even_where_nothing_moves(backbone_folder: Folder, tmp_path: Path, capsys: Out) -> None:
    text, one, out = tmp_path / "t.txt", str(tmp_path / "a"), str(tmp_path / "b")
    text.write_text("blue spice is near the river")
    own, other = str(backbone_folder("gpt2")), str(backbone_folder("gpt2", 1))
    assert run(["capture", "--backbone", own, "--text", str(text), "-o", one]) == 0
    for arguments in (["compose", one, one], ["slice", one, ":2"]):
        assert run([*arguments, "-o", out, "--backbone", own]) == 0
        assert run([*arguments, "-o", out, "--backbone", other]) == 2
        assert "weights hash" in capsys.readouterr().err
    assert run(["compose", one, one, "-o", out]) == 0
    assert "keys as they are, those of a real text" in capsys.readouterr().out


def test_average_and_cast(files: tuple[str, str], tmp_path: Path, capsys: Out) -> None:
    first, second = files
    mean, half = str(tmp_path / "mean"), str(tmp_path / "half")
    assert run(["average", first, second, "--weights", "1,0", "-o", mean]) == 0
    assert run(["diff", first, mean, "--json"]) == 0
    capsys.readouterr()
    assert load(mean).tensors.keys() == load(first).tensors.keys()
    assert all(load(mean).tensors[name].tobytes() == array.tobytes() for name, array in load(first).tensors.items())
    assert run(["cast", first, "--dtype", "float16", "-o", half]) == 0
    assert "note: numbers moved by at most" in capsys.readouterr().out
    assert {array.dtype for array in load(half).tensors.values()} == {np.dtype(np.float16)}


def test_diff(files: tuple[str, str], tmp_path: Path, capsys: Out) -> None:
    first, second = files
    assert run(["diff", first, first, "--exit-code"]) == 0
    assert capsys.readouterr().out == "equal\n"
    assert run(["diff", first, second, "--exit-code"]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 4
    assert shown[0].startswith("decoder.self.layers.0.key: max ")
    assert ", cosine " in shown[0]
    longer = str(tmp_path / "longer")
    save(small_prefix(seed=0, length=5), longer)
    assert run(["diff", first, longer, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["equal"], report["tensors"]) == (1, False, [])
    assert report["tensors_equal"] is False
    assert {"where": "/injections/0/length", "how": "4 and 5"} in report["differences"]
    half = str(tmp_path / "half")
    assert run(["cast", first, "--dtype", "float16", "-o", half]) == 0
    capsys.readouterr()
    assert run(["diff", first, half]) == 0
    told = capsys.readouterr().out
    assert "(float32 [2, 4, 4] and float16 [2, 4, 4])" in told
    assert "cosine 1.000000" in told
    assert "/provenance/parents" in told
    assert run(["diff", first, half, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 4


def test_tensors_that_are_equal_are_called_so(files: tuple[str, str], tmp_path: Path, capsys: Out) -> None:
    first, same = files[0], str(tmp_path / "same")
    assert run(["average", first, first, "-o", same]) == 0
    capsys.readouterr()
    assert run(["diff", first, same, "--exit-code"]) == 3
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "tensors: equal"
    assert all(line.startswith("/provenance") for line in told[1:])
    assert run(["diff", first, same, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["equal"], report["tensors_equal"]) == (False, True)
    assert run(["diff", first, first, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors_equal"] is True
    assert run(["diff", first, str(tmp_path / "no"), "--exit-code"]) == 2


def test_nothing_is_written_over_its_own_parent(files: tuple[str, str], capsys: Out) -> None:
    first, second = files
    before = Path(first).read_bytes()
    for arguments in (
        ["cast", first, "--dtype", "float16"],
        ["slice", first, ":2"],
        ["compose", second, first],
        ["average", first, second],
    ):
        assert run([*arguments, "-o", first]) == 2, arguments
        told = f"{arguments[0]}: {first}: expected an output beside the inputs; found one of the inputs"
        assert told in capsys.readouterr().err
        assert Path(first).read_bytes() == before


def test_an_encoder_is_not_asked_for_a_backbone_in_vain(tmp_path: Path, capsys: Out) -> None:
    one, path = small_prefix(), str(tmp_path / "p")
    backbone = replace(
        one.manifest.backbone,
        family="modernbert",
        rope={"rope_type": "default"},
        stacks={"encoder": one.manifest.backbone.stacks["decoder"]},
    )
    records = tuple(replace(record, stack="encoder") for record in one.manifest.injections)
    tensors = {name.replace("decoder", "encoder"): array for name, array in one.tensors.items()}
    save(Prefix(replace(one.manifest, backbone=backbone, injections=records), tensors), path)
    for extra in ([], ["--backbone", str(tmp_path)]):
        assert run(["compose", path, path, "-o", str(tmp_path / "out"), *extra]) == 2
        assert "found those of modernbert, an encoder that turns them" in capsys.readouterr().err


def test_one_line_for_every_mistake(files: tuple[str, str], tmp_path: Path, capsys: Out) -> None:
    first, second = files
    output = str(tmp_path / "out")
    for arguments, told in (
        (["compose", first, "-o", output], "compose: expected two prefixes or more; found 1"),
        (["compose", first, str(tmp_path / "no"), "-o", output], "expected a safetensors file; found nothing"),
        (["slice", first, "4", "-o", output], "expected START:STOP; found '4'"),
        (["slice", first, "4:9", "-o", output], "decoder.self: expected some of 4 slots; found none in 4:9"),
        (["average", first, second, "--weights", "1;2", "-o", output], "--weights: expected numbers with commas"),
        (["average", first, second, "--weights", "1", "-o", output], "expected 2 numbers from 0"),
        (["cast", first, "--dtype", "fp8", "-o", output], "found 'fp8'"),
        (["diff", first, str(tmp_path)], "expected a safetensors file; found a folder"),
    ):
        assert run(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert not Path(output).exists()


def test_nothing_heavy_is_loaded_without_a_backbone(files: tuple[str, str], tmp_path: Path) -> None:
    code = (
        "import sys; from prefixkit.cli import run\n"
        f"assert run(['compose', *{files!r}, '-o', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
