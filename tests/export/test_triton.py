"""A Triton repository: its configurations by protobuf's own parser, its models loaded and run where they lie."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from prefixkit.cli import run
from prefixkit.errors import ConfigError, FormatError, InputError
from prefixkit.export.triton import MARKER, write_triton
from prefixkit.export.triton_config import config_of
from prefixkit.prefix import key_values, load
from prefixkit.serving.report import read_report
from prefixkit.serving.session import Session
from tests.exported import exported, exported_pair

PROMPT = [5, 9, 17]
NEW = 4

FIELDS = {
    "Tensor": [("name", 1, "string", False), ("data_type", 2, "DataType", False), ("dims", 4, "int64", True)],
    "Group": [("count", 2, "int32", False), ("kind", 4, "Kind", False)],
    "Value": [("string_value", 1, "string", False)],
    "Parameter": [("key", 1, "string", False), ("value", 2, "Value", False)],
    "ModelConfig": [
        ("name", 1, "string", False),
        ("backend", 17, "string", False),
        ("max_batch_size", 4, "int32", False),
        ("input", 5, "Tensor", True),
        ("output", 6, "Tensor", True),
        ("instance_group", 7, "Group", True),
        ("parameters", 14, "Parameter", True),
    ],
}
"""What is used of Triton's model_config.proto; the text form of a map is that of a repeated pair."""
ENUMS = {
    "DataType": {"TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_INT64": 9, "TYPE_FP16": 10, "TYPE_FP32": 11, "TYPE_BF16": 14},
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}
TYPES = {
    "TYPE_INT64": onnx.TensorProto.INT64,
    "TYPE_FP16": onnx.TensorProto.FLOAT16,
    "TYPE_FP32": onnx.TensorProto.FLOAT,
}


def schema() -> type[Any]:
    """The message class of ModelConfig."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            if kind in FIELDS or kind in ENUMS:
                made.type = kinds.TYPE_MESSAGE if kind in FIELDS else kinds.TYPE_ENUM
                made.type_name = f".inference.{kind}"
            else:
                made.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def parsed(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), schema()())


def graph_of(model: Path) -> onnx.GraphProto:
    return onnx.load(model / "1" / "model.onnx", load_external_data=False).graph


def session_of(model: Path) -> Any:
    return onnxruntime.InferenceSession(str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])


def assert_says_what_the_graph_says(model: Path) -> None:
    config, graph, session = parsed(model), graph_of(model), session_of(model)
    assert (config.name, config.backend, config.max_batch_size) == (model.name, "onnxruntime", 0)
    assert [(one.count, one.kind) for one in config.instance_group] == [(1, ENUMS["Kind"]["KIND_AUTO"])]
    types = {ENUMS["DataType"][name]: number for name, number in TYPES.items()}
    for said, there in ((config.input, graph.input), (config.output, graph.output)):
        found = [(one.name, types[one.data_type], list(one.dims)) for one in said]
        assert found == [(one.name, one.type.tensor_type.elem_type, dims(one)) for one in there]
    # The backend compares with what ONNX Runtime makes of the graph, which may know more than is declared.
    for said, there in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        sizes = {one.name: [size if isinstance(size, int) else -1 for size in one.shape] or [1] for one in there}
        assert {one.name: list(one.dims) for one in said} == sizes


def dims(value: onnx.ValueInfoProto) -> list[int]:
    """As Triton knows them: -1 for what may be chosen, [1] for one number."""
    shape = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else -1 for size in shape] or [1]


def parameters(model: Path) -> dict[str, str]:
    return {one.key: one.value.string_value for one in parsed(model).parameters}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def buffered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An exported folder and its repository."""
    folder = exported(request.param, target="cuda").folder
    repository = tmp_path_factory.mktemp("triton") / "repository"
    write_triton(folder, repository)
    return folder, repository


def test_configurations_say_what_the_graphs_say(buffered: tuple[Path, Path]) -> None:
    folder, repository = buffered
    backbone = read_report(folder).backbone
    roles = json.loads((repository / MARKER).read_text())["models"]
    assert set(roles) == {"prompts", "decode", "place"}
    # Triton takes every folder for a model.
    assert sorted(path.name for path in repository.iterdir() if path.is_dir()) == sorted(roles.values())
    for role, name in roles.items():
        assert_says_what_the_graph_says(repository / name)
        said = parameters(repository / name)
        assert said["prefixkit.role"] == role
        assert said["prefixkit.backbone_weights_hash"] == backbone.weights_hash
        assert said["prefixkit.backbone_config_hash"] == backbone.config_hash
        assert name in (repository / "README.md").read_text()


def test_weights_are_stored_once(buffered: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, repository = buffered
    inodes = {path.stat().st_ino for path in repository.glob("*/1/model.safetensors")}
    assert inodes == {(folder / "onnx" / "model.safetensors").stat().st_ino}
    assert len(list(repository.glob("*/1/model.safetensors"))) == 2

    # On another file system they are copied, once.
    link = os.link

    def linked(source: Path, target: Path) -> None:
        if source.is_relative_to(folder.resolve()):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr("os.link", linked)
    write_triton(folder, tmp_path / "elsewhere")
    copies = {path.stat().st_ino for path in (tmp_path / "elsewhere").glob("*/1/model.safetensors")}
    assert len(copies) == 1
    assert not copies & inodes


def test_a_client_of_the_models_writes_what_a_session_writes(buffered: tuple[Path, Path]) -> None:
    """The loop of the README, with arrays in the place of shared memory, and in row 1 of 2."""
    folder, repository = buffered
    models = {
        role: session_of(repository / name)
        for role, name in json.loads((repository / MARKER).read_text())["models"].items()
    }
    prefix = load(folder / "prefix.safetensors")
    tensors = [each for pair in key_values(prefix) for each in pair]
    past = [one.name for one in models["prompts"].get_inputs() if one.name.startswith("past_key_values.")]
    buffers = {
        name: np.zeros((2, each.shape[0], 32, each.shape[2]), np.float32)
        for name, each in zip(past, tensors, strict=True)
    }

    def asked(role: str, given: dict[str, Any], rows: slice) -> list[Any]:
        """A pass over `rows`, whose buffers are replaced; gives what comes before them."""
        known = {one.name for one in models[role].get_inputs()}
        given = {name: value for name, value in given.items() if name in known}
        found = models[role].run(None, {**given, **{name: each[rows] for name, each in buffers.items()}})
        for each, written in zip(buffers.values(), found[-len(buffers) :], strict=True):
            each[rows] = written
        return found[: -len(buffers)]

    length, text_start = tensors[0].shape[1], prefix.manifest.injections[0].positions.text_start
    names = [f"prefix.{layer}.{which}" for layer in range(len(tensors) // 2) for which in ("key", "value")]
    given = {name: each[None].astype(np.float32) for name, each in zip(names, tensors, strict=True)}
    assert asked("place", given, slice(1, 2)) == []

    def pass_(role: str, ids: list[list[int]], index: list[int], positions: list[list[int]], last: list[int]) -> int:
        numbers = {"input_ids": ids, "write_index": index, "position_ids": positions, "last": last}
        _, token = asked(role, {name: np.array(value, np.int64) for name, value in numbers.items()}, slice(0, 2))
        return int(token[1])

    count = len(PROMPT)
    places = [list(range(count)), list(range(text_start, text_start + count))]
    # Row 0 reads the same text without a prefix, at places of its own.
    token = pass_("prompts", [PROMPT, PROMPT], [0, length], places, [count - 1, count - 1])
    written = [token]
    for step in range(NEW - 1):
        at = count + step
        token = pass_("decode", [[1], [token]], [at, length + at], [[at], [text_start + at]], [0, 0])
        written.append(token)
    assert written == greedy(folder)


def greedy(folder: Path) -> list[int]:
    """What a session's own buffers give behind the folder's prefix."""
    session = Session(folder, device="cpu", threads=1)
    rows = session.runtime.rows(1, 32)
    rows.begin(0, session.prefixes["own"])
    found, written = rows.read(0, [PROMPT]), []
    for _ in range(NEW):
        written.append(int(found.tokens[0]))
        found = rows.read(0, [[written[-1]]])
    return written


def test_other_folders_become_repositories_too(tmp_path: Path) -> None:
    for folder, roles in ((exported("gpt2").folder, {"model"}), (exported_pair("bart").folder, {"encoder", "decoder"})):
        models = write_triton(folder, tmp_path / "repository")
        assert {model.role for model in models} == roles
        for model in models:
            assert_says_what_the_graph_says(tmp_path / "repository" / model.name)
            session = session_of(tmp_path / "repository" / model.name)
            given = {one.name: example(one) for one in session.get_inputs()}
            assert all(np.isfinite(each).all() for each in session.run(None, given))


def example(value: Any) -> Any:
    """An input in which every size that may be chosen is 2; a mask is over 2 that went before, and 2 more."""
    sizes = [size if isinstance(size, int) else 4 if "total" in size else 2 for size in value.shape]
    return np.ones(sizes, {"tensor(int64)": np.int64, "tensor(float)": np.float32}[value.type])


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    folder = exported("gpt2").folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    for repository in (tmp_path / "mine", folder):
        with pytest.raises(InputError, match=r"expected an empty folder, a new one or one with triton\.json"):
            write_triton(folder, repository)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "x"
    assert (folder / "export.json").is_file()
    write_triton(folder, tmp_path / "ours")
    write_triton(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "ours"]


def test_a_damaged_folder_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    shutil.copytree(exported("gpt2").folder, tmp_path / "served")
    graph = tmp_path / "served" / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"model\.onnx: expected"):
        write_triton(tmp_path / "served", tmp_path / "repository")
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_types_that_the_backend_does_not_take_are_refused() -> None:
    value = ir.Value(name="past", shape=ir.Shape(["rows", 4]), type=ir.TensorType(ir.DataType.BFLOAT16))
    with pytest.raises(ConfigError, match=r"input past: .* found BFLOAT16; export with --dtype float16 or float32"):
        config_of("model", ir.Graph([value], [], nodes=[]), {})


def test_names_are_quoted() -> None:
    text = config_of("model", ir.Graph([], [], nodes=[]), {"backbone": 'C:\\"ü"\x1b'})
    assert text_format.Parse(text, schema()()).parameters[0].value.string_value == 'C:\\"ü"'


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = exported("gpt2").folder
    assert run(["export", "--triton", str(folder), "-o", str(tmp_path / "repository")]) == 0
    name = next(path.name for path in (tmp_path / "repository").iterdir() if path.is_dir())
    assert capfd.readouterr().out.startswith(f"wrote {tmp_path / 'repository'}: {name}\n")
    assert run(["export", "--triton", str(tmp_path), "-o", str(tmp_path / "other")]) == 2
    assert "export.json: expected the report of an exported folder" in capfd.readouterr().err
