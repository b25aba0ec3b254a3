"""Graphs that write into buffers, every architecture: texts of all lengths behind prefixes of all lengths, in and out.

pytest -m matrix tests/export
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefixkit.backbones.load import load_backbone
from prefixkit.errors import ConfigError, ParityError
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.format.manifest import BackboneIdentity
from prefixkit.injections import KeyValuePrefix, key_value_prefix
from prefixkit.prefix import Prefix
from prefixkit.serving import buffers
from prefixkit.serving.buffered_runtime import BufferedRuntime, Rows
from prefixkit.serving.prefix_table import Array, ServedPrefix, served
from prefixkit.serving.report import read_report
from tests.architectures import CONFIGS, WINDOW, tiny
from tests.exported import backbone, exported, random_prefix

TABLE = Path(__file__).parent / "BUFFERED.md"
TOLERANCE, EFFECT = 1e-4, 0.05
LENGTHS = (0, 40, 7, 5, 23, 0, 12)
PROMPTS = (5, 1, 17, 3, 9, 2, 30)
STEPS = 32
ROWS = 3
WITHOUT = ("falcon", "bloom")
"""Attention that is not in the registry of transformers, and goes through the portable graph."""
HEADER = """# Graphs that write into buffers against PyTorch, every architecture

Written by `pytest -m matrix tests/export/test_buffered.py`: tiny random models (2 layers, weights times 3), float32, on
a CPU. Seven texts in three rows of buffers, behind prefixes of 0 to 40 slots (less where a window is narrower), prompts
of 1 to 30 tokens and 32 tokens behind each; a text that is done makes room for the next while the others go on. Then
again with three of them behind one prefix that is kept once. Each text against itself alone, without buffers or
padding, in the unmodified model. Effect: the least of a prefix. Nodes: of the graphs for prompts, tokens and sharing.

| architecture | max abs d of logits | greedy tokens | effect of the prefix | nodes | export, seconds |
|---|---|---|---|---|---|
"""


@dataclass
class Text:
    """One text, and what the graphs said of it."""

    prompt: list[int]
    prefix: Prefix | None
    shared: bool = False
    written: list[int] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)

    def hear(self, logits: Array) -> None:
        self.logits.append(logits)
        self.written.append(int(logits.argmax()))


def texts(identity: BackboneIdentity, *, sharing: bool = False) -> list[Text]:
    """Behind a prefix each; with `sharing` every other one is behind the longest, without a copy of it."""
    narrow = min(layer.window or 1000 for layer in identity.stacks["decoder"])
    random, made = np.random.default_rng(0), []
    for seed, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        length = min(length, narrow - 1)
        prefix = random_prefix(identity, seed=seed, length=length, task=None) if length else None
        made.append(Text(random.integers(5, identity.vocab_size, prompt).tolist(), prefix))
    for text in made[1::2] if sharing else ():
        text.prefix, text.shared = made[1].prefix, True
    return made


def write(runtime: BufferedRuntime, asked: list[Text], capacity: int) -> None:
    """Write every text, `ROWS` at a time: new ones are read one by one, the others go on together."""
    rows = runtime.rows(ROWS, capacity, sharing=any(text.shared for text in asked))
    at: list[Text | None] = [None] * ROWS
    waiting, table = list(asked), dict[int, ServedPrefix]()
    while waiting or any(at):
        for row, one in enumerate(at):
            if one is None and waiting:
                at[row] = new = waiting.pop(0)
                if new.prefix is not None and id(new.prefix) not in table:
                    table[id(new.prefix)] = served(new.prefix, runtime.dtype)
                rows.begin(row, table.get(id(new.prefix)), shared=new.shared)
                new.hear(rows.read(row, [new.prompt]).logits[0])
        found = rows.read(0, [[] if one is None else one.written[-1:] for one in at]).logits
        for row, one in enumerate(at):
            if one is not None:
                one.hear(found[row])
                at[row] = None if len(one.logits) == STEPS + 1 else one
        for row, one in enumerate(at):
            if one is None:
                rows.begin(row, None)


def alone(folder: Path, text: Text, prefix: Prefix | None) -> Array:
    """What the model says behind the prompt and each of the 32 tokens, with nothing around it."""
    decoder = load_backbone(folder)
    given: KeyValuePrefix | None = None if prefix is None else key_value_prefix(prefix)
    whole = torch.tensor([[*text.prompt, *text.written[:-1]]])
    with torch.no_grad():
        found: Array = decoder.logits(whole, None, given)[0, len(text.prompt) - 1 :].numpy()
    return found


def measured(family: str, *, sharing: bool = False) -> tuple[float, float]:
    """The largest difference, and the least effect of a prefix; greedy tokens are equal."""
    folder, done = backbone(family), exported(family, target="cuda")
    runtime = BufferedRuntime(read_report(done.folder), device="cpu", threads=1)
    asked = texts(load_backbone(folder).identity, sharing=sharing)
    # What is shared takes no slots, but the others' prefixes do.
    capacity = max(LENGTHS[::2]) + max(PROMPTS) + STEPS if sharing else 128
    write(runtime, asked, capacity)
    differences, effects = [], []
    for text in asked:
        expected = alone(folder, text, text.prefix)
        assert expected.argmax(-1).tolist() == text.written
        differences.append(float(np.abs(np.stack(text.logits) - expected).max()))
        if text.prefix is not None:
            effects.append(float(np.abs(expected - alone(folder, text, None)).max()))
    return max(differences), min(effects)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, str]]:
    """Table rows by architecture; the table is written when all of them were measured."""
    found: dict[str, str] = {}
    yield found
    if list(found) == [family for family in CONFIGS if family not in WITHOUT]:
        TABLE.write_text(HEADER + "".join(found.values()))


def nodes(done: Exported) -> str:
    files = [done.folder / "onnx" / name for name in ("model.onnx", "decode.onnx", "shared.onnx")]
    return ", ".join(str(len(onnx.load(file, load_external_data=False).graph.node)) for file in files)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "mistral_window"])
def test_texts_come_and_go(family: str, sharing: bool) -> None:
    difference, effect = measured(family, sharing=sharing)
    assert difference <= TOLERANCE
    assert effect > EFFECT


@pytest.mark.matrix
@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in WITHOUT])
def test_every_architecture(family: str, rows: dict[str, str]) -> None:
    found = [measured(family, sharing=sharing) for sharing in (False, True)]
    difference, effect = max(each[0] for each in found), min(each[1] for each in found)
    assert difference <= TOLERANCE
    assert effect > EFFECT
    done = exported(family, target="cuda")
    seconds = sum(done.seconds.values())
    rows[family] = f"| {family} | {difference:.1e} | equal | {effect:.2f} | {nodes(done)} | {seconds:.0f} |\n"


@pytest.mark.parametrize("family", WITHOUT)
def test_what_cannot_write_into_buffers_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"found {family}; use --target portable"):
        export_onnx(None, backbone(family), tmp_path / "served", target="cuda")
    assert not (tmp_path / "served").exists()


def test_heads_that_the_operator_does_not_take_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=40, n_head=2, vocab_size=64, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"expected heads of a multiple of 8 dimensions, .* found 20; use --target p"):
        export_onnx(None, tmp_path / "model", tmp_path / "served", target="cuda")


def test_a_dropped_prefix_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers.Buffers, "place", lambda *_: None)
    loaded = load_backbone(backbone("gpt2"))
    with pytest.raises(ParityError, match="case 'prefix'"):
        export_onnx(random_prefix(loaded.identity), loaded, tmp_path / "served", target="cuda")
    assert not (tmp_path / "served").exists()


def test_weights_are_the_checkpoints_own(tmp_path: Path) -> None:
    done = exported("llama", target="cuda")
    folder = done.folder / "onnx"
    stored = backbone("llama") / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == stored.read_bytes()
    for name in ("model.onnx", "decode.onnx", "shared.onnx"):
        assert (folder / name).stat().st_size < 100_000
        graph = onnx.load(folder / name, load_external_data=False).graph
        outside = {one.name: {entry.key: entry.value for entry in one.external_data} for one in graph.initializer}
        used = {name: entries for name, entries in outside.items() if entries}
        assert {entries["location"] for entries in used.values()} == {"model.safetensors"}
        assert len(used) >= 15
        assert not any(node.op_type == "Transpose" and node.input[0] in used for node in graph.node)


def test_weights_of_another_dtype_are_written_once(tmp_path: Path) -> None:
    tiny("llama").half().save_pretrained(tmp_path / "half")
    for file in backbone("llama").glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    done = export_onnx(None, tmp_path / "half", tmp_path / "served", target="cuda")
    whole = sum(one.numel() * 4 for one in AutoModelForCausalLM.from_pretrained(tmp_path / "half").parameters())
    assert (done.folder / "onnx" / "model.safetensors").stat().st_size < 1.1 * whole
    assert not list((done.folder / "onnx").glob("*.data"))
    assert len({file.stat().st_mode for file in (done.folder / "onnx").iterdir()}) == 1, "whoever serves may read all"


def test_float16_is_as_good_as_pytorchs_own(tmp_path: Path) -> None:
    loaded = load_backbone(backbone("gpt2"), dtype="float16")
    done = export_onnx(random_prefix(loaded.identity), loaded, tmp_path / "served", target="cuda", dtype="float16")
    assert all(case.max_abs_difference <= case.tolerance for case in done.cases)
    assert min(case.effect for case in done.cases if case.effect is not None) > EFFECT


def test_bfloat16_is_verified_by_its_twin_where_it_cannot_run(tmp_path: Path) -> None:
    tiny("qwen3").bfloat16().save_pretrained(tmp_path / "half")
    for file in backbone("qwen3").glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    loaded = load_backbone(tmp_path / "half", dtype="bfloat16")
    prefix = random_prefix(loaded.identity)
    done = export_onnx(prefix, loaded, tmp_path / "served", target="cuda", dtype="bfloat16")
    assert all(case.name.endswith(", in float32") and case.max_abs_difference <= TOLERANCE for case in done.cases)
    assert min(case.effect for case in done.cases if case.effect is not None) > EFFECT
    # Half the bytes of the twin, and the checkpoint's own.
    stored = (tmp_path / "half" / "model.safetensors").read_bytes()
    assert (done.folder / "onnx" / "model.safetensors").read_bytes() == stored
    graph = onnx.load(done.folder / "onnx" / "decode.onnx", load_external_data=False).graph
    types = {one.name: one.type.tensor_type.elem_type for one in graph.input}
    assert types["past_key_values.0.key"] == onnx.TensorProto.BFLOAT16
    assert {one.op_type for one in graph.node} >= {"RMSNormalization", "GroupQueryAttention"}
    assert not list(tmp_path.glob(".twin-*"))


def test_a_graph_of_one_size_says_the_same() -> None:
    """As on a GPU, where a pass over all rows is recorded."""
    runtime = BufferedRuntime(read_report(exported("llama", target="cuda").folder), device="cpu", threads=1)
    recorded = runtime.recorded(2, 24)
    assert all(isinstance(size, int) for one in recorded.session.get_inputs() for size in one.shape)
    found = []
    for graph in (runtime.tokens, recorded):
        rows = Rows(runtime, runtime.rows(2, 24).buffers, graph, whole=graph is recorded)
        rows.read(0, [[5, 6, 7], [8]])
        rows.read(1, [[11, 12]])
        rows.read(0, [[13]])
        found.append(rows.read(0, [[9], [10]]).logits)
    assert np.abs(found[0] - found[1]).max() <= 1e-5
    assert np.abs(found[0][0] - found[0][1]).max() > EFFECT


@pytest.mark.parametrize("family", ["gpt2", "mistral_window"])
def test_a_single_row_reads_its_prompt_as_a_batch_does(family: str) -> None:
    runtime = BufferedRuntime(read_report(exported(family, target="cuda").folder), device="cpu", threads=1)
    identity = load_backbone(backbone(family)).identity
    prefix = served(random_prefix(identity, length=9, task=None), runtime.dtype)
    prompt, found = list(range(5, 35)), []
    for count in (1, 2):
        rows = runtime.rows(count, 64)
        rows.begin(0, prefix)
        rows.read(0, [prompt[:3]] * count)
        found.append(rows.read(0, [prompt[3:]] * count).logits[0])
    assert np.abs(found[0] - found[1]).max() <= 1e-5


def test_windows_narrower_than_a_text_are_kept() -> None:
    assert max(PROMPTS) + STEPS > WINDOW
