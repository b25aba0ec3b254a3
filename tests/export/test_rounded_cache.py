"""Keys and values of eight bits: that graphs keep and read them, as PyTorch would, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

from prefixkit.backbones.load import load_backbone
from prefixkit.cli import run
from prefixkit.errors import ConfigError, FormatError, InputError, ParityError
from prefixkit.export.onnx import Exported, export_onnx
from prefixkit.injections import key_value_prefix
from prefixkit.prefix import Prefix
from prefixkit.serving import buffers
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.cache_scales import MOST_LOST, CacheScales
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.report import read_report
from prefixkit.serving.session import Session
from tests.architectures import CONFIGS
from tests.export.test_buffered import EFFECT, LENGTHS, PROMPTS, STEPS, WITHOUT, Text, texts, write
from tests.exported import backbone, exported, random_prefix
from tests.small_tokenizer import END, write_folder

FLIPPED = 0.02
"""Of the largest logit: a number between two whole ones goes to the one or the other with the last place of float32."""


def eight_bits(family: str) -> Exported:
    return exported(family, target="cuda", kv_cache="int8")


def times(prefix: Prefix, by: float) -> Prefix:
    return Prefix(prefix.manifest, {name: array * np.float32(by) for name, array in prefix.tensors.items()})


class ByHand(DynamicLayer):  # type: ignore[misc]
    """A layer's cache that rounds what it is given, the prefix as well."""

    def __init__(self, key: Array, value: Array) -> None:
        super().__init__()
        self.scales = (key, value)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        whole = [
            np.clip(np.rint(new.numpy() / scale), -128, 127) * scale
            for new, scale in zip((key_states, value_states), self.scales, strict=True)
        ]
        kept: tuple[Tensor, Tensor] = super().update(*map(torch.from_numpy, whole))
        return kept


@torch.no_grad()
def alone(family: str, text: Text, scales: dict[str, Array] | None, prefix: Prefix | None) -> Array:
    """What the model says behind the prompt and each token, in float32 or with rounded keys and values."""
    model = AutoModelForCausalLM.from_pretrained(backbone(family))
    cache = DynamicCache()
    if scales is not None:
        pairs = range(model.config.num_hidden_layers)
        cache.layers = [ByHand(scales[f"{layer}.key"], scales[f"{layer}.value"]) for layer in pairs]
    if prefix is not None:
        given = key_value_prefix(prefix)
        for layer, (key, value) in enumerate(zip(given.keys, given.values, strict=True)):
            cache.update(key[None], value[None], layer)
    whole = torch.tensor([[*text.prompt, *text.written[:-1]]])
    start = cache.get_seq_length()
    positions = torch.arange(start, start + whole.shape[1])[None]
    keywords = {} if family == "opt" else {"position_ids": positions}
    mask = torch.ones(1, start + whole.shape[1], dtype=torch.long)
    found = model(input_ids=whole, attention_mask=mask, past_key_values=cache, **keywords).logits[0]
    said: Array = found[len(text.prompt) - 1 :].numpy()
    return said


def measured(family: str, *, sharing: bool) -> None:
    done = eight_bits(family)
    runtime = BufferedRuntime(read_report(done.folder), device="cpu", threads=1)
    asked = texts(load_backbone(backbone(family)).identity, sharing=sharing)
    write(runtime, asked, max(LENGTHS) + max(PROMPTS) + STEPS)
    scales = dict(np.load(done.folder / "onnx" / "cache.npz"))
    ours, rounding, effects = [], [], []
    for text in asked:
        expected, exact = alone(family, text, scales, text.prefix), alone(family, text, None, text.prefix)
        ours.append(np.abs(np.stack(text.logits) - expected).max(-1) / np.abs(expected).max())
        rounding.append(np.abs(exact - expected).max(-1) / np.abs(expected).max())
        if text.prefix is not None:
            effects.append(float(np.abs(expected - alone(family, text, scales, None)).max()))
    apart, cost = np.concatenate(ours), np.concatenate(rounding)
    assert np.median(apart) <= 1e-4
    assert apart.max() <= FLIPPED
    assert np.median(cost) > 10 * np.median(apart), "nothing is rounded"
    assert min(effects) > EFFECT


@pytest.mark.parametrize("sharing", [False, True])
def test_graphs_compute_with_what_eight_bits_hold(sharing: bool) -> None:
    measured("llama", sharing=sharing)


@pytest.mark.matrix
@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in WITHOUT])
def test_every_architecture(family: str, sharing: bool) -> None:
    measured(family, sharing=sharing)


def test_a_folder_says_so_and_keeps_a_quarter() -> None:
    done, usual = eight_bits("llama"), exported("llama", target="cuda")
    report = json.loads((done.folder / "export.json").read_text())
    assert report["contract"]["kv_cache"].startswith("int8")
    assert report["buffered"]["scales"] == "onnx/cache.npz"
    assert "onnx/cache.npz" in {file["file"] for file in report["graph"]["files"]}
    assert report["graph"]["weights"] == "checkpoint"
    for name in ("model.onnx", "decode.onnx", "shared.onnx", "place.onnx"):
        graph = onnx.load(done.folder / "onnx" / name, load_external_data=False).graph
        types = {one.name: one.type.tensor_type.elem_type for one in [*graph.input, *graph.output]}
        kept = {element for name, element in types.items() if name.endswith((".key", ".value"))}
        assert kept == {onnx.TensorProto.INT8}
    sizes = [
        BufferedRuntime(read_report(each.folder), device="cpu").rows(2, 24).buffers.bytes for each in (done, usual)
    ]
    assert 4 * sizes[0] == sizes[1]


def test_its_own_prefix_fits_and_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_backbone(backbone("gpt2"))
    large = times(random_prefix(loaded.identity), 2)
    done = export_onnx(large, loaded, tmp_path / "served", target="cuda", kv_cache="int8")
    cases = {case.name: case for case in done.cases}
    assert cases["prefix"].max_abs_difference <= cases["prefix"].tolerance
    assert (cases["prefix"].effect or 0) > 10 * cases["prefix"].tolerance
    assert "own" in Session(done.folder, device="cpu").prefixes
    monkeypatch.setattr(buffers.Buffers, "place", lambda *_: None)
    with pytest.raises(ParityError, match="case 'prefix'"):
        export_onnx(large, loaded, tmp_path / "another", target="cuda", kv_cache="int8")


def test_a_prefix_that_does_not_fit_is_refused() -> None:
    session = Session(eight_bits("llama").folder, device="cpu")
    own = random_prefix(session.report.backbone)
    session.add_prefix("fits", times(own, 0.5))
    message = r"prefix 'large': expected (keys|values) of layer 0 .* within 3%; found \d+% lost; export again with th"
    with pytest.raises(InputError, match=message):
        session.add_prefix("large", times(own, 5))
    assert "large" not in session.prefixes


def test_what_is_lost_is_told_as_a_share() -> None:
    scales = CacheScales((np.full((1, 1, 2), 0.1, np.float32),))
    assert scales.rounded([np.array([[[12.74, -13], [0.04, -0.06]]])])[0].tolist() == [[[127, -128], [0, -1]]]
    (lost,) = scales.lost([np.array([[[25.4, 0.0]]], np.float32)])
    assert lost == pytest.approx(0.5)
    assert scales.lost([np.zeros((1, 1, 2), np.float32)]) == [0.0]
    with pytest.raises(InputError, match="keys of layer 0 that eight bits can hold, within 3%; found 50% lost; export"):
        scales.refuse_larger("p", [np.array([[[25.4, 0.0]]])])
    scales.refuse_larger("p", [np.array([[[12.7, 0.0]]])])
    assert MOST_LOST == 0.03


def test_scales_of_another_model_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    loaded = load_backbone(backbone("gpt2"))
    done = export_onnx(None, loaded, tmp_path / "served", target="cuda", kv_cache="int8")
    file = done.folder / "onnx" / "cache.npz"
    whole = dict(np.load(file))
    report = json.loads((done.folder / "export.json").read_text())
    report["graph"]["files"] = []
    (done.folder / "export.json").write_text(json.dumps(report))
    others = (lambda each: each[:1], np.zeros_like, lambda each: each * np.nan, lambda each: each.astype(np.float64))
    for other in others:
        np.savez(file, **{name: other(tensor) for name, tensor in whole.items()})
        with pytest.raises(FormatError, match="expected scales of 2 layers; found others; export again"):
            Session(done.folder, device="cpu")
    for damaged in (b"", b"no", file.read_bytes()[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match="expected a file of scales; found a damaged one; export again"):
            Session(done.folder, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cuda", "--kv-cache", "fp8"], "--kv-cache: expected int8; found 'fp8'"),
        (["--kv-cache", "int8"], "--kv-cache: expected --target cuda; found --target portable"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--onnx", "-o", "y", "--backbone", "z", *options]) == 2
    assert capfd.readouterr().err == f"prefixkit: {message}\n"


def test_triton_clients_would_have_to_round(tmp_path: Path) -> None:
    from prefixkit.export.triton import write_triton

    with pytest.raises(ConfigError, match="expected keys and values in the graph's dtype; found eight bits"):
        write_triton(eight_bits("llama").folder, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_numbers_without_end_are_refused() -> None:
    scales = CacheScales((np.full((1, 1, 2), 1e-3, np.float32),))
    with pytest.raises(InputError, match="expected keys of layer 0"):
        scales.refuse_larger("p", [np.array([[[3e38, 1.0]]], np.float32)])


@pytest.mark.parametrize("by", [1e6, 3e38])
def test_a_prefix_beside_which_no_text_is_left_is_refused(by: float, tmp_path: Path) -> None:
    loaded = load_backbone(backbone("gpt2"))
    made = random_prefix(loaded.identity)
    for tensor in made.tensors.values():
        tensor[..., 0, :] = by
    with pytest.raises(InputError, match=r"texts beside this prefix: expected \w+ of layer|expected finite logits"):
        export_onnx(made, loaded, tmp_path / "served", target="cuda", kv_cache="int8")
    assert not (tmp_path / "served").exists()


def test_channels_that_rotate_slowly_fit_at_the_end_of_the_context(tmp_path: Path) -> None:
    """At the beginning a channel has not shown how large it is where the one that it rotates with is large."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias.normal_(0, 10)
    model.save_pretrained(tmp_path / "model")
    write_folder(tmp_path / "model", tokenizer_config={"bos_token": END, "eos_token": END})
    done = export_onnx(None, tmp_path / "model", tmp_path / "served", target="cuda", kv_cache="int8")
    cache = DynamicCache()
    with torch.no_grad():
        model.eval()(torch.randint(64, (1, 1500)), past_key_values=cache)
    runtime = BufferedRuntime(read_report(done.folder), device="cpu", threads=1)
    assert runtime.scales is not None
    kept = [cache.layers[0].keys[0, :, -200:].numpy(), cache.layers[0].values[0, :, -200:].numpy()]
    assert max(runtime.scales.lost(kept)) <= MOST_LOST
