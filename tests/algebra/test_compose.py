"""Prefixes one behind the other: what is exact is compared with the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from prefixkit.algebra import Rotation, cast, compose, cut
from prefixkit.backbones.attach import attach
from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.backbones.load import load_backbone, load_decoder
from prefixkit.backbones.rotation import rotations
from prefixkit.errors import BackboneError, ConfigError, FormatError, MismatchError
from prefixkit.format.manifest import InjectionRecord, Manifest, Positions, Provenance
from prefixkit.injections import KeyValuePrefixes, injection, records_of
from prefixkit.prefix import Prefix, content_of, load, save
from prefixkit.training.capture import capture
from tests.encoder_decoders import folder_of, random_prefixes
from tests.prefixes import small_prefix, soft_prompt

Folder = Callable[..., Path]
TOLERANCE = 1e-5
EFFECT = 1.0
FIRST, SECOND = "blue spice is near the river", "the eagle mill pub : cheap coffee shop food"
TEXT = torch.arange(40, 52)[None]


def model_in(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def ids(decoder: Any, prefix: Prefix, text: str) -> Tensor:
    from prefixkit.task import encode_context, load_tokenizer

    assert prefix.manifest.task is not None
    return torch.tensor([encode_context(prefix.manifest.task, load_tokenizer(decoder.folder), text, where="test")])


def apart(first: int, second: int, text: int) -> Tensor:
    """[1, 1, all, all]: causal, but that the second context does not see the first."""
    everything = first + second + text
    seen = torch.ones(everything, everything).tril().bool()
    seen[first : first + second, :first] = False
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "llama3"])
def test_contexts_are_what_the_model_computes_of_them_apart(
    family: str, backbone_folder: Folder, tmp_path: Path
) -> None:
    folder = backbone_folder("llama") if family == "llama3" else backbone_folder(family)
    if family == "llama3":
        folder = scaled(folder, tmp_path / "scaled")
    decoder = load_decoder(folder)
    one, two = capture(decoder, FIRST), capture(decoder, SECOND)
    both = compose([one, two], rotations=rotations(decoder)).prefix
    assert both.manifest.provenance.config["positions"] == ["turned"]
    first, second = ids(decoder, one, FIRST), ids(decoder, two, SECOND)
    shift, total = first.shape[1], first.shape[1] + second.shape[1]
    model = model_in(folder)

    cache = DynamicCache()
    places = torch.arange(shift, total)[None]
    logits(model, input_ids=second, position_ids=places, past_key_values=cache, use_cache=True)
    for layer, made in enumerate(cache.layers):
        ours = both.tensors[f"decoder.self.layers.{layer}.key"][:, shift:]
        assert np.abs(ours - made.keys[0].numpy()).max() <= TOLERANCE
        assert np.abs(ours - two.tensors[f"decoder.self.layers.{layer}.key"]).max() > EFFECT

    together = torch.cat([first, second, TEXT], dim=1)
    mask = apart(shift, total - shift, TEXT.shape[1])
    expected = logits(model, input_ids=together, attention_mask=mask)[:, total:]
    bare = logits(model, input_ids=TEXT)
    found = logits(attach(model, both), input_ids=TEXT)
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - bare).abs().max() > EFFECT


def scaled(folder: Path, output: Path) -> Path:
    """The backbone in `folder` with the frequencies of Llama 3."""
    import json
    import shutil

    shutil.copytree(folder, output)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (output / "config.json").write_text(json.dumps(config))
    return output


def test_a_slice_of_what_was_composed_is_what_went_in(backbone_folder: Folder) -> None:
    decoder = load_decoder(backbone_folder("llama"))
    one, two, turned = capture(decoder, FIRST), capture(decoder, SECOND), rotations(decoder)
    lengths = [prefix.manifest.injections[0].length or 0 for prefix in (one, two)]
    both = compose([one, two], rotations=turned).prefix
    front = cut(both, 0, lengths[0]).prefix
    assert front.manifest.injections == one.manifest.injections
    for name, array in one.tensors.items():
        assert front.tensors[name].tobytes() == array.tobytes()
    back = cut(both, lengths[0], sum(lengths), rotations=turned).prefix
    assert back.manifest.injections == two.manifest.injections
    for name, array in two.tensors.items():
        assert np.abs(back.tensors[name] - array).max() <= 5e-6
        assert name.endswith("key") or back.tensors[name].tobytes() == array.tobytes()


def test_without_rotation_bytes_are_joined() -> None:
    one, two, three = (small_prefix(seed=seed, length=seed) for seed in (2, 3, 4))
    both = compose([one, two, three]).prefix
    for name, array in both.tensors.items():
        assert array.tobytes() == np.concatenate([p.tensors[name] for p in (one, two, three)], axis=1).tobytes()
    (record,) = both.manifest.injections
    assert (record.length, record.positions) == (9, Positions(text_start=9))
    assert cut(both, 2, 5).prefix.tensors["decoder.self.layers.1.key"].tobytes() == (
        two.tensors["decoder.self.layers.1.key"].tobytes()
    )


def test_the_file_says_what_it_is_made_of(tmp_path: Path) -> None:
    one, two = save(small_prefix(seed=1), tmp_path / "a"), small_prefix(seed=2, length=4)
    made = compose([one, two])
    save(made.prefix, tmp_path / "ab")
    stored = load(tmp_path / "ab").manifest
    assert stored.provenance.parents == (one.manifest.content, content_of(two))
    assert stored.provenance.parents[1] == save(two, tmp_path / "b").manifest.content
    assert stored.provenance.config["operation"] == "compose"
    assert stored.provenance.config["lengths"] == [[3, 4]]
    assert stored.provenance.config["positions"] == ["kept"]
    assert "keys as they are" in made.notes[0]
    assert (stored.provenance.metrics, stored.provenance.seed) == ({}, None)
    assert stored.task is not None
    assert stored.task.max_length == 24


def prompt(folder: Path, length: int, seed: int) -> Prefix:
    return soft_prompt(load_decoder(folder).identity, length=length, seed=seed)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_soft_prompts_become_one_prompt(family: str, backbone_folder: Folder) -> None:
    folder = backbone_folder(family)
    one, two = prompt(folder, 3, 1), prompt(folder, 4, 2)
    model = model_in(folder)
    vectors = [torch.tensor(prefix.tensors["prompt.embeddings"]) for prefix in (one, two)]
    together = torch.cat([*vectors, model.get_input_embeddings()(TEXT)[0].detach()])[None]
    expected, bare = logits(model, inputs_embeds=together)[:, 7:], logits(model, input_ids=TEXT)
    found = logits(attach(model, compose([one, two]).prefix), input_ids=TEXT)
    assert (found - expected).abs().max() <= TOLERANCE
    assert (found - bare).abs().max() > EFFECT


def changed(prefix: Prefix, **changes: Any) -> Prefix:
    (record,) = prefix.manifest.injections
    return Prefix(replace(prefix.manifest, injections=(replace(record, **changes),)), prefix.tensors)


def test_leading_frozen_slots_are_counted_through() -> None:
    sinks, mixed = changed(small_prefix(), frozen_slots=3), changed(small_prefix(), frozen_slots=1)
    for parts, frozen in (([sinks, mixed], 4), ([mixed, sinks], 1), ([sinks, sinks, mixed], 7)):
        assert compose(parts).prefix.manifest.injections[0].frozen_slots == frozen


def test_tokens_and_tasks(backbone_folder: Folder) -> None:
    one, two = (changed(prompt(backbone_folder("gpt2"), 2, 0), token_ids=ids) for ids in ((4, 5), (6, 7)))
    assert compose([one, two]).prefix.manifest.injections[0].token_ids == (4, 5, 6, 7)
    assert compose([one, changed(two, token_ids=None)]).prefix.manifest.injections[0].token_ids is None
    first, second = small_prefix(), small_prefix(seed=3)
    assert first.manifest.task is not None
    other = Prefix(replace(second.manifest, task=replace(first.manifest.task, name="qa", max_length=9)), second.tensors)
    made = compose([first, other])
    assert made.notes[1] == "tasks differ: the first one's (e2e) is kept, not that of qa"
    assert made.prefix.manifest.task == replace(first.manifest.task, max_length=9)
    bare = Prefix(replace(second.manifest, task=None), second.tensors)
    made = compose([bare, first])
    assert (made.prefix.manifest.task, len(made.notes)) == (first.manifest.task, 1)


def rotary(prefix: Prefix) -> Prefix:
    backbone = replace(prefix.manifest.backbone, family="llama", rope={"rope_type": "default", "rope_theta": 1e4})
    return Prefix(replace(prefix.manifest, backbone=backbone), prefix.tensors)


def unheard_of(prefix: Prefix) -> Prefix:
    backbone = replace(prefix.manifest.backbone, family="gpt_neo")
    return Prefix(replace(prefix.manifest, backbone=backbone), prefix.tensors)


def test_a_family_without_rotary_positions_is_measured_where_it_is_not_known() -> None:
    one = unheard_of(small_prefix(seed=1))
    made = compose([one, one], rotations=[Rotation(np.zeros(0, np.float32))] * 2)
    assert made.prefix.manifest.provenance.config["positions"] == ["kept"]
    assert "keys as they are" in made.notes[0]
    assert made.prefix.tensors["decoder.self.layers.0.key"][:, 3:].tobytes() == (
        one.tensors["decoder.self.layers.0.key"].tobytes()
    )


def test_keys_of_an_encoder_with_rotary_positions_cannot_be_moved() -> None:
    one = changed(rotary(small_prefix()), stack="encoder")
    backbone = one.manifest.backbone
    backbone = replace(backbone, family="modernbert", stacks={"encoder": backbone.stacks["decoder"]})
    tensors = {name.replace("decoder", "encoder"): array for name, array in one.tensors.items()}
    reading = Prefix(replace(one.manifest, backbone=backbone), tensors)
    told = "expected keys of a decoder, .* found those of modernbert, an encoder that .*; train them in one piece"
    for move in (lambda: compose([reading, reading]), lambda: cut(reading, 1, None)):
        with pytest.raises(ConfigError, match=told):
            move()
    assert cut(reading, None, 2).prefix.manifest.injections[0].length == 2
    still = changed(reading, positions=Positions(text_start=0, prefix_takes_positions=False))
    assert compose([still, still]).prefix.manifest.injections[0].length == 6


def test_turned_beyond_float16_is_told_with_its_place() -> None:
    large, turn = rotary(small_prefix(dtype=np.float16)), [Rotation(np.array([1.0, 0.1], np.float32))] * 2
    tensors = {name: np.full_like(array, 6e4) for name, array in large.tensors.items()}
    parts = [large, Prefix(large.manifest, tensors)]
    with pytest.raises(FormatError) as caught:
        compose(parts, rotations=turn)
    told = (
        "compose: prefix 2: decoder.self.layers.0.key, turned: expected numbers up to 65504 for float16; found 75051.4"
    )
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith("; `prefixkit cast --dtype float32` first")
    wide = [cast(part, "float32").prefix for part in parts]
    assert np.abs(compose(wide, rotations=turn).prefix.tensors["decoder.self.layers.0.key"]).max() > 65504


def test_what_cannot_be_composed_is_refused() -> None:
    one = small_prefix()
    head = InjectionRecord(kind="task_head", labels=2, reads="first")
    with_head = Prefix(replace(one.manifest, injections=(head,)), one.tensors)
    half = small_prefix(dtype=np.float16)
    nowhere = changed(one, positions=Positions(text_start=0, prefix_takes_positions=False))
    elsewhere = changed(one, positions=Positions(text_start=1))
    for parts, told in (
        ([one], "compose: expected two prefixes or more; found 1"),
        ([one, half], "key: expected float32; found float16; `prefixkit cast --dtype float32` it first"),
        (
            [one, with_head],
            "compose: prefix 2: expected key_value_prefix decoder self, as in the first; found task_head",
        ),
        ([with_head, with_head], "expected keys and values or prompts before the text; found task_head"),
        ([one, nowhere], "expected prefixes that all take positions, or none; found some of each"),
        ([elsewhere, elsewhere], "expected text that starts at 3, behind the prefix"),
        ([elsewhere, elsewhere], "found text that starts at 1 with one that takes positions"),
        ([changed(one, placement="slots")] * 2, "found key_value_prefix in slots of the text"),
        ([changed(elsewhere, placement="after_first")] * 2, "found key_value_prefix behind the first token of the"),
        ([changed(elsewhere, kind="hidden_prompt", mode="add")] * 2, "found hidden_prompt added to the text"),
        ([one] * 11, "expected at most 30 slots (a context of 32, 2 left for text); found 33"),
        ([rotary(one), rotary(one)], "expected the backbone, to move them by 3 positions; found none; add --backbone"),
        ([unheard_of(one)] * 2, "keys of gpt_neo, which may turn with their positions: expected the backbone"),
    ):
        with pytest.raises(ConfigError) as caught:
            compose(parts)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    stranger = replace(one.manifest, backbone=replace(one.manifest.backbone, weights_hash="b3t-v1:" + "e" * 64))
    with pytest.raises(MismatchError, match="compose: prefix 2: expected the first one's backbone, weights hash"):
        compose([one, Prefix(stranger, one.tensors)])


def test_prefixes_without_positions_do_not_move() -> None:
    still = changed(rotary(small_prefix(seed=1)), positions=Positions(text_start=0, prefix_takes_positions=False))
    both = compose([still, still])
    name = "decoder.self.layers.0.key"
    assert both.prefix.tensors[name][:, 3:].tobytes() == still.tensors[name].tobytes()
    assert both.prefix.manifest.injections[0].positions == Positions(text_start=0, prefix_takes_positions=False)
    assert "the prefixes take no positions" in both.notes[0]


def test_a_window_that_would_swallow_them_is_refused() -> None:
    one = small_prefix()
    layers = tuple(replace(layer, window=6) for layer in one.manifest.backbone.stacks["decoder"])
    backbone = replace(one.manifest.backbone, stacks={"decoder": layers})
    narrow = Prefix(replace(one.manifest, backbone=backbone), one.tensors)
    with pytest.raises(ConfigError, match=r"at most 5 slots \(a sliding window of 6\); found 6"):
        compose([narrow, narrow])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_far_away_keys_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters={"rope_theta": 1e4, **rope})
    rotary = LlamaRotaryEmbedding(config)
    plain = torch.randn(1, 2, 9, 32, generator=torch.Generator().manual_seed(1))

    def at(start: int) -> Any:
        cos, sin = rotary(plain, torch.arange(start, start + 9)[None])
        return apply_rotary_pos_emb(plain, plain, cos, sin)[1][0].numpy()

    turn = Rotation(rotary.inv_freq.numpy())
    assert np.abs(turn.moved(at(0), 0, 100_003) - at(100_003)).max() <= 5e-6
    assert np.abs(turn.moved(at(100_003), 100_003, -100_003) - at(0)).max() <= 5e-6
    assert np.abs(at(100_003) - at(0)).max() > EFFECT


def test_prefixes_of_an_encoder_decoder_are_joined_in_each_place(tmp_path: Path) -> None:
    backbone = load_backbone(folder_of("bart", tmp_path / "bart"))
    assert isinstance(backbone, EncoderDecoder)
    parts = [random_prefixes(backbone, length) for length in (3, 4)]
    manifests = [
        Manifest(
            backbone=backbone.identity, injections=records_of(part), provenance=Provenance(method="m", prefixkit="0")
        )
        for part in parts
    ]
    one, two = (
        Prefix(manifest, {name: array for each in part.parts for name, array in each.arrays().items()})
        for manifest, part in zip(manifests, parts, strict=True)
    )
    save(compose([one, two]).prefix, tmp_path / "both")
    assert_each_place_is_cut_by_its_own_length(one, two)
    both = injection(load(tmp_path / "both"))
    assert isinstance(both, KeyValuePrefixes)
    backbone.refuse_unplaceable(both)
    assert [part.length for part in both.parts] == [7, 7, 7]
    for name, array in load(tmp_path / "both").tensors.items():
        assert array.tobytes() == np.concatenate([one.tensors[name], two.tensors[name]], axis=1).tobytes()


def assert_each_place_is_cut_by_its_own_length(short: Prefix, long: Prefix) -> None:
    """With the encoder's slots of `long` and all others of `short`."""
    records = [
        theirs if ours.stack == "encoder" else ours
        for ours, theirs in zip(short.manifest.injections, long.manifest.injections, strict=True)
    ]
    tensors = {name: (long if name.startswith("encoder") else short).tensors[name] for name in short.tensors}
    made = cut(Prefix(replace(short.manifest, injections=tuple(records)), tensors), 1, None).prefix
    lengths = {(record.stack, record.attention): record.length for record in made.manifest.injections}
    assert lengths == {("decoder", "self"): 2, ("decoder", "cross"): 2, ("encoder", "self"): 3}
    for name, array in tensors.items():
        assert made.tensors[name].tobytes() == array[:, 1:].tobytes()
    assert sorted(made.manifest.provenance.config["slots"]) == [[1, 3], [1, 3], [1, 4]]


def test_rotation_of_neighbours() -> None:
    turn = Rotation(np.array([0.5], np.float32), interleaved=True)
    keys = np.array([[[1, 0, 7, 8]]], np.float32)
    assert np.allclose(turn.moved(keys, 0, 2), [[[np.cos(1), np.sin(1), 7, 8]]])
    assert np.allclose(turn.moved(turn.moved(keys, 0, 9), 9, -9), keys)


def test_rotations_that_cannot_be_known(backbone_folder: Folder) -> None:
    with pytest.raises(BackboneError, match="found others in layer 0"):
        rotations(load_decoder(backbone_folder("gpt2")))
    decoder = load_decoder(backbone_folder("llama"))
    decoder.identity = replace(decoder.identity, rope={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(BackboneError, match="found dynamic scaling"):
        rotations(decoder)
    local = load_decoder(backbone_folder("gemma3"))
    sliding, full = rotations(local)
    assert sliding.frequencies[1] > full.frequencies[1]
    assert [len(turn.frequencies) for turn in rotations(load_decoder(backbone_folder("bloom")))] == [0, 0]
