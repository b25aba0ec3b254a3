"""A served folder: prompts and prefixes in one batch, each row as if it were alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prefixkit.backbones.load import load_backbone
from prefixkit.errors import ConfigError, FormatError, InputError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import key_value_prefix
from prefixkit.prefix import Prefix, save
from prefixkit.serving.sampling import Sampling
from prefixkit.serving.session import OWN, Session
from prefixkit.task import encode_prompt, load_tokenizer, stop_ids
from tests.exported import TASK, backbone, exported, random_prefix

FAMILIES = ["gpt2", "llama"]
PROMPTS = ["Blue Spice", "The Eagle is a coffee shop near Burger King .", "x"]


def prefix_for(family: str, **options: object) -> Prefix:
    return random_prefix(load_backbone(backbone(family)).identity, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(family: str) -> Session:
    made = Session(exported(family).folder, device="cpu", threads=1)
    made.add_prefix("other", prefix_for(family, seed=2, length=3))
    return made


@pytest.mark.parametrize("prefix", [OWN, None])
def test_writes_what_pytorch_writes(session: Session, family: str, prefix: str | None) -> None:
    decoder, tokenizer = load_backbone(backbone(family)), load_tokenizer(backbone(family))
    prompts = [encode_prompt(TASK, tokenizer, {"input": text}, room=1) for text in PROMPTS]
    injection = key_value_prefix(prefix_for(family)) if prefix else None
    expected = decoder.generate(prompts, injection, stop=stop_ids(TASK, tokenizer), max_new_tokens=20)
    found = session.generate(PROMPTS, prefix, max_new_tokens=20)
    assert [list(row.token_ids) for row in found] == expected
    assert [row.prompt_tokens for row in found] == [len(prompt) for prompt in prompts]


def test_prefixes_matter(session: Session) -> None:
    texts = {name: session.generate(PROMPTS[:1], name, max_new_tokens=12)[0].text for name in (OWN, "other", None)}
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=50, seed=7)], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_its_neighbours(session: Session, sampling: Sampling) -> None:
    names = [OWN, None, "other"]
    batch = session.generate(PROMPTS, names, max_new_tokens=20, sampling=sampling)
    for row, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True)):
        alone = Sampling(**{**vars(sampling), "seed": sampling.seed + row})
        assert session.generate([prompt], name, max_new_tokens=20, sampling=alone) == [batch[row]]


def test_streamed_pieces_are_the_text(session: Session) -> None:
    texts = ["", "", ""]
    done = {}
    for piece in session.stream(PROMPTS, max_new_tokens=15):
        assert piece.row not in done
        texts[piece.row] += piece.text
        if piece.completion is not None:
            done[piece.row] = piece.completion
    assert [done[row].text for row in range(3)] == texts
    assert [done[row] for row in range(3)] == session.generate(PROMPTS, max_new_tokens=15)


def test_stop_token_ends_its_row_only(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(temperature=2.0, seed=3)
    free = session.generate(PROMPTS[:2], max_new_tokens=10, sampling=sampling)
    stop = free[0].token_ids[4]
    assert stop not in free[0].token_ids[:4]
    assert stop not in free[1].token_ids
    monkeypatch.setattr("prefixkit.serving.prompts.stop_ids", lambda *_: (stop,))
    stopped = session.generate(PROMPTS[:2], max_new_tokens=10, sampling=sampling)
    assert (stopped[0].token_ids, stopped[0].finish) == (free[0].token_ids[:4], "stop")
    assert stopped[1] == free[1]
    assert free[1].finish == "length"


def test_fields_by_name_are_the_same_as_text(session: Session) -> None:
    by_name = session.generate([{"input": "Blue Spice"}], max_new_tokens=5)
    assert by_name == session.generate(["Blue Spice"], max_new_tokens=5)
    with pytest.raises(InputError, match="prompt 1: expected the fields 'input'; found 'question'"):
        session.generate([{"question": "?"}])


def test_rows_that_finish_early_may_wait_past_the_end_of_the_context(session: Session) -> None:
    long = session.generate(["x"], None, max_new_tokens=110)
    both = session.generate(["x", "Blue " * 11], None, max_new_tokens=None)
    assert both[0].token_ids[:110] == long[0].token_ids
    assert both[1].finish == "length"


def test_context_overflow_is_refused_in_one_line(session: Session) -> None:
    long = "spice " * 200
    with pytest.raises(
        InputError,
        match=r"max_new_tokens: expected from 1 to \d+ new tokens, .* left behind prompt 1; found 128",
    ):
        session.generate(["x", "Blue Spice"], max_new_tokens=128)
    written = session.generate(["x"])[0]
    assert len(written.token_ids) <= 128 - 6 - written.prompt_tokens
    session.add_prefix("plain", prefix_for(session.report.backbone.family, task=None))
    # A prefix without a contract falls back to the folder's.
    told = r"prompt 1: expected at most 48 tokens, which leave 16 of the 64 that the task 'say' allows; found \d\d+"
    with pytest.raises(InputError, match=told):
        session.generate([long], "plain")


def test_a_prompt_is_never_cut(session: Session) -> None:
    tokens = len(session.tokenizer.encode_text("spice " * 10))
    texts = ["spice " * 10 + word for word in ("pub", "riverside")]
    written = session.generate(texts, max_new_tokens=1)
    assert min(row.prompt_tokens for row in written) > tokens
    with pytest.raises(InputError, match="expected at most 63 tokens, which leave 1 of the 64"):
        session.generate(["spice " * 200], max_new_tokens=1)


def test_prompt_longer_than_the_context_is_refused_where_no_task_truncates(family: str, tmp_path: Path) -> None:
    folder = copied(family, tmp_path)
    (folder / "prefix.safetensors").unlink()
    edit(folder, {"prefix": None})
    bare = Session(folder, device="cpu", threads=1)
    with pytest.raises(InputError, match="expected at most 112 tokens, which leave 16 of the 128 that the context has"):
        bare.generate(["spice " * 200])
    assert bare.generate(["Blue Spice"], max_new_tokens=3)[0].prompt_tokens == len(
        bare.tokenizer.encode_text("Blue Spice")
    )


@pytest.mark.parametrize(
    ("prompts", "prefix", "message"),
    [
        (["x"], "othr", "prefix: expected the name of one; found 'othr'; did you mean 'other'"),
        (["x"], [OWN, None], "prefix: expected one, or one for each of 1 prompts; found 2"),
        ([], OWN, "prompts: expected at least one; found none"),
        ("x", OWN, "prompts: expected a list of them; found one string"),
        ([3], OWN, "prompt 1: expected text, fields by name, or a tuple of token ids; found int"),
        (["x", [5, 6]], OWN, "prompt 2: expected text, fields by name, or a tuple of token ids; found list"),
        ([{"input": 3}], OWN, "prompt 1: expected text as 'input'; found int"),
        ([{"input": ["x"]}], OWN, "prompt 1: expected text as 'input'; found list"),
        ([{"input": [{"role": "user"}]}], OWN, "prompt 1: expected text; found 'input'; conversations need"),
    ],
)
def test_bad_calls_are_one_line(session: Session, prompts: list[object] | str, prefix: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.generate(prompts, prefix)  # type: ignore[arg-type]


def test_half_a_token_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens: expected from 1 to .* found 1\.5"):
        session.generate(["x"], max_new_tokens=1.5)  # type: ignore[arg-type]


def test_fields_in_json_are_texts(session: Session, family: str) -> None:
    task = replace(TASK, input_template="{name} of {year}")
    session.add_prefix("dated", prefix_for(family, task=task))
    assert session.generate(['{"name": "x", "year": "3"}'], "dated", max_new_tokens=2)
    for value in ("3", "null", "[1]"):
        with pytest.raises(InputError, match="prompt 1: expected text as 'year'; found"):
            session.generate([f'{{"name": "x", "year": {value}}}'], "dated")


def test_prefix_for_other_weights_is_refused_unless_allowed(session: Session, family: str) -> None:
    stranger = random_prefix(load_backbone(backbone(family, 1)).identity)
    with pytest.raises(MismatchError, match="weights hash"):
        session.add_prefix("stranger", stranger)
    session.add_prefix("stranger", stranger, allow_mismatch=True)
    assert session.generate(["x"], "stranger", max_new_tokens=2)[0].token_ids


def test_model_without_positions_refuses_a_prefix_that_shifts_them(family: str, tmp_path: Path) -> None:
    folder = copied(family, tmp_path)
    report = json.loads((folder / "export.json").read_text())
    del report["graph"]["inputs"]["position_ids"]
    report["prefix"]["file"] = None
    edit(folder, report)
    made, shifted = Session(folder, device="cpu", threads=1), prefix_for(family)
    record = replace(shifted.manifest.injections[0], positions=Positions(text_start=0, prefix_takes_positions=False))
    manifest = replace(shifted.manifest, injections=(record,))
    with pytest.raises(
        ConfigError, match="expected a text that starts at 6: the model counts its prefix; found one that"
    ):
        made.add_prefix("shifted", Prefix(manifest, shifted.tensors))


def copied(family: str, place: Path) -> Path:
    return Path(shutil.copytree(exported(family).folder, place / "served"))


def edit(folder: Path, changes: dict[str, object]) -> None:
    path = folder / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_cannot_be_served_are_one_line(family: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"export.json: expected the report of an exported folder; found no such folder"
    ):
        Session(tmp_path / "nowhere")
    folder = copied(family, tmp_path)
    edit(folder, {"version": 2})
    with pytest.raises(FormatError, match="expected version 1; found 2; export again"):
        Session(folder)
    edit(folder, {"version": 1, "graph": {}})
    with pytest.raises(
        FormatError, match=r"/graph: expected the field 'file'; found none \(and 2 more\): export again"
    ):
        Session(folder)


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("graph", {"dtype": "banana"}, "/graph/dtype: expected 'float32' or 'float16' or 'bfloat16'; found 'banana'"),
        (
            "graph",
            {"dtype": "float16"},
            "model.onnx: expected the past that export.json describes: 4 tensors of float16",
        ),
        ("graph", {"file": 3}, "/graph/file: expected a file inside the folder; found 3"),
        ("graph", {"file": "../served/onnx/model.onnx"}, "/graph/file: expected a file inside the folder"),
        ("graph", {"file": "/served/onnx/model.onnx"}, "/graph/file: expected a file inside the folder"),
        ("graph", {"inputs": None}, "/graph/inputs: expected an object; found None"),
        ("backbone", {"stacks": {}}, "/backbone/stacks: expected an object that is not empty"),
        ("backbone", {"context_length": "x"}, "/backbone/context_length: expected a whole number of 1 or more"),
        ("prefix", {"file": "../prefix.safetensors"}, "/prefix/file: expected a file inside the folder"),
        ("prefix", {"manifest": {}}, "/prefix/manifest: expected the field 'schema'"),
        ("prefix", {"baked": "no"}, "/prefix/baked: expected true or false"),
    ],
)
def test_damaged_report_is_one_line(part: str, changes: dict[str, object], told: str, tmp_path: Path) -> None:
    folder = copied("gpt2", tmp_path)
    report = json.loads((folder / "export.json").read_text())
    edit(folder, {part: {**report[part], **changes}})
    with pytest.raises(FormatError) as caught:
        Session(folder, device="cpu", threads=1)
    assert told in str(caught.value)


@pytest.mark.parametrize("part", ["graph", "backbone", "prefix"])
def test_report_with_a_part_of_another_kind_is_one_line(part: str, tmp_path: Path) -> None:
    folder = copied("gpt2", tmp_path)
    for other in ([], "x", 7):
        edit(folder, {part: other})
        with pytest.raises(FormatError, match=f"/{part}: expected an object"):
            Session(folder, device="cpu", threads=1)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_damaged_graph_is_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copied("gpt2", tmp_path)
    path = folder / "onnx" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FormatError, match=rf"{name}: expected the exported file; found another of the same size"):
        Session(folder)
    path.write_bytes(whole[:100])
    with pytest.raises(FormatError, match=rf"{name}: expected {len(whole):,} bytes; found 100; export again"):
        Session(folder)
    graph = json.loads((folder / "export.json").read_text())["graph"]
    edit(folder, {"graph": {**graph, "files": []}})
    with pytest.raises(FormatError, match=r"model.onnx: expected a graph that onnxruntime can load"):
        Session(folder, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_prefix_exchanged_in_the_folder_is_checked(family: str, tmp_path: Path) -> None:
    folder = copied(family, tmp_path)
    save(random_prefix(load_backbone(backbone(family, 1)).identity), folder / "prefix.safetensors")
    with pytest.raises(MismatchError, match="weights hash"):
        Session(folder)


def test_tokenizer_exchanged_in_the_folder_is_refused(family: str, tmp_path: Path) -> None:
    folder = copied(family, tmp_path)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"!":', '"?!":'))
    with pytest.raises(MismatchError, match=r"tokenizer.json: expected the exported one, b3-v1:\w+; found b3-v1:"):
        Session(folder, device="cpu", threads=1).generate(["x"], max_new_tokens=1)


def test_cuda_is_never_claimed_without_a_gpu(family: str) -> None:
    made = Session(exported(family).folder, threads=1)
    providers = made.runtime.graph.session.get_providers()
    assert made.device == ("cuda" if "CUDAExecutionProvider" in providers else "cpu")
    with pytest.raises(ConfigError, match="--device: expected auto, cpu or cuda; found 'tpu'"):
        Session(exported(family).folder, device="tpu")  # type: ignore[arg-type]


def test_baked_folder_serves_its_one_prefix() -> None:
    baked = Session(exported("mistral_window", baked=True).folder, device="cpu", threads=1)
    decoder, tokenizer = load_backbone(backbone("mistral_window")), load_tokenizer(backbone("mistral_window"))
    prompts = [encode_prompt(TASK, tokenizer, {"input": text}, room=1) for text in PROMPTS]
    injection = key_value_prefix(prefix_for("mistral_window"))
    expected = decoder.generate(prompts, injection, stop=stop_ids(TASK, tokenizer), max_new_tokens=20)
    assert [list(row.token_ids) for row in baked.generate(PROMPTS, max_new_tokens=20)] == expected
    with pytest.raises(ConfigError, match="found a graph with its prefix inside; export without --baked"):
        baked.generate(PROMPTS, None)
    with pytest.raises(ConfigError, match="found a baked one"):
        baked.add_prefix("other", prefix_for("mistral_window"))


def test_serving_needs_neither_torch_nor_transformers_nor_onnx() -> None:
    program = """
import sys
from prefixkit.serving.session import Session
Session(sys.argv[1], device="cpu").generate(["x"], max_new_tokens=2)
print([name for name in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir") if name in sys.modules])
"""
    folder = str(exported("gpt2").folder)
    ran = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("threads", [0, -1, 1_000_000])
def test_as_many_threads_as_nobody_has_are_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"^threads: expected from 1 to 1024; found {threads}$"):
        Session(exported("gpt2").folder, device="cpu", threads=threads)
