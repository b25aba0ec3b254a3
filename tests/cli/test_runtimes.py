"""The catalogue of runtimes: every row is a flag and a line, and what a row says of itself is so."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.catalogue import RUNTIMES, Runtime, chosen, function, runtime
from prefixkit.cli import run
from prefixkit.cli.runtime_flags import flags
from prefixkit.errors import ConfigError
from prefixkit.prefix import load, save
from tests.cli.test_options import options
from tests.exported import LENGTH, backbone, random_prefix

ROW = Runtime(name="x", title="X", goes="", stays="", tried="", settings={"flash": ("off", "on")})


def test_every_row_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["runtimes"]) == 0
    told = capfd.readouterr().out
    assert run(["runtimes", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in document["runtimes"]] == [row.name for row in RUNTIMES]
    for row in RUNTIMES:
        assert row.title in told
        assert row.goes.split(":")[0].split(",")[0] in told


def test_every_row_has_its_flags() -> None:
    for command, attribute, home in (("export", "writes", "exporter"), ("import", "reads", "importer")):
        rows = {row.name for row in RUNTIMES if getattr(row, home)}
        assert {name.replace("_", "-") for name in flags(attribute)} == rows
        assert {f"--{name}" for name in rows} <= set(options()[command])


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_a_row_names_what_there_is(row: Runtime) -> None:
    for home in (row.exporter, row.importer):
        assert home is None or callable(function(home))
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert row.extra is None or row.extra in project["optional-dependencies"]
    assert row.exporter or row.importer or row.how


def test_names_are_unique() -> None:
    assert len({row.name for row in RUNTIMES}) == len(RUNTIMES)
    with pytest.raises(ConfigError, match="did you mean 'peft'"):
        runtime("pefd")


def test_settings_are_those_of_the_row() -> None:
    assert chosen(ROW, {}) == {"flash": "off"}
    assert chosen(ROW, {"flash": "on"}) == {"flash": "on"}
    with pytest.raises(ConfigError, match="export --x: expected flash=off or on; found 'maybe'"):
        chosen(ROW, {"flash": "maybe"})
    with pytest.raises(ConfigError, match="expected no setting but flash; found flesh"):
        chosen(ROW, {"flesh": "on"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--peft", "-o", "y"], "export --peft: expected a prefix file; found none"),
        (["export", "--peft", "x"], "export --peft: expected --output; found none"),
        (["export", "--genai", "x", "-o", "y"], "export --genai: expected --backbone; found none"),
        (["export", "--mlx", "x", "-o", "y", "--set", "a"], "--set: expected name=value; found 'a'"),
        (["export", "--mlx", "x", "-o", "y", "--set", "a=b"], "export --mlx: expected no setting but"),
        (
            ["export", "--mlx", "x", "-o", "y", "--set", "dtype=float16", "--dtype", "float32"],
            "--set: expected dtype once; found float32 and float16",
        ),
        (["export", "--peft", "x", "-o", "y", "--set", "a=b"], "export --peft: expected no --set; found a=b"),
        (
            ["export", "--peft", "x", "-o", "y", "--dtype", "float16"],
            "export --peft: expected no --dtype; found float16",
        ),
        (["export", "--peft", "x", "-o", "y", "--baked"], "export --peft: expected no --baked; found True"),
        (["export", "--peft", "x", "-o", "y", "--backbone", "z"], "export --peft: expected no --backbone; found z"),
        (["export", "--peft", "x", "-o", "y", "--target", "portable"], "export --peft: expected no --target"),
        (["export", "--triton", "x", "-o", "y", "--dtype", "float16"], "export --triton: expected no --dtype"),
        (["export", "--onnx", "x", "-o", "y", "--backbone", "z", "--set", "a=b"], "export --onnx: expected no --set"),
        (["export", "--peft", "--onnx", "x", "-o", "y"], "export: expected a form to export to; found two"),
        (
            ["export", "--mlx", "x.safetensors", "-o", "x.safetensors"],
            "export --mlx: x.safetensors: expected an output",
        ),
        (["import", "x", "-o", "y"], "import: expected where the prefix comes from; found none; add --peft"),
        (["import", "--mlx", "x", "-o", "x"], "import --mlx: x: expected an output beside the inputs"),
        (["import", "--mlx", "x", "-o", "y", "--task", "e2e"], "import --mlx --task: expected --backbone; found none"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"prefixkit: {message}")
    assert err.count("\n") == 1


def test_how_to_ask_stays_behind_and_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An export says that the task is lost; an import takes it again, and the tensors are the same."""
    here, there, back = (str(tmp_path / name) for name in ("p.safetensors", "peft", "back.safetensors"))
    made = save(random_prefix(load_backbone(backbone("llama")).identity), here)
    assert made.manifest.task is not None
    assert run(["export", "--peft", here, "-o", there, "--json"]) == 0
    (told,) = json.loads(capfd.readouterr().out)["lost"]
    assert told.startswith("PEFT is not told how to ask (template 'name : {input}', separator")
    task = tmp_path / "say.toml"
    task.write_text(f'input_template = "name : {{input}}"\nseparator = "{made.manifest.task.separator}"\n')
    arguments = ["import", "--peft", there, "-o", back, "--backbone", str(backbone("llama"))]
    assert run(arguments) == 0
    assert "how it is asked is unknown" in capfd.readouterr().out
    assert load(back).manifest.task is None
    assert run([*arguments, "--task", str(task)]) == 0
    assert "unknown" not in capfd.readouterr().out
    found = load(back)
    assert found.manifest.task is not None
    assert found.manifest.task.input_template == made.manifest.task.input_template
    assert found.manifest.task.max_length == (made.manifest.backbone.context_length or 0) - LENGTH
    assert all(found.tensors[name].tobytes() == array.tobytes() for name, array in made.tensors.items())
