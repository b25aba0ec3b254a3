"""Prefixes in the caches of `transformers`, one for a batch or one for each row, and captured from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.load import load_backbone
from prefixkit.bridges.transformers_cache import dynamic_cache, static_cache, text_behind
from prefixkit.bridges.transformers_capture import import_cache
from prefixkit.errors import BackboneError, ConfigError, MismatchError
from prefixkit.format.manifest import Manifest, Positions, Provenance
from prefixkit.injections import EmbeddingPrompt, Injection, KeyValuePrefix, key_value_prefix, records_of
from prefixkit.prefix import Prefix, compare, load, save
from tests.ragged import alone, greedy, padded, prompts, random_prefix

Folder = Callable[..., Path]
TOLERANCE = 1e-5
EFFECT = 1.0
STEPS = 8
FULL = ["gpt2", "llama", "opt", "falcon"]
SLIDING = ["mistral_window", "gemma2", "gemma3"]
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def model_in(folder: Path) -> PreTrainedModel:
    implementation = "eager" if "gemma2" in folder.name or "bloom" in folder.name else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=implementation)
    return model.eval()


def strong(model: PreTrainedModel, length: int, seed: int) -> KeyValuePrefix:
    drawn = random_prefix(model, length, seed)
    return replace(drawn, keys=tuple(k * 2 for k in drawn.keys), values=tuple(v * 3 for v in drawn.values))


def filed(folder: Path, injected: Injection) -> Prefix:
    manifest = Manifest(
        backbone=load_backbone(folder).identity,
        injections=records_of(injected),
        provenance=Provenance(method="random", prefixkit="0.1.0"),
    )
    return Prefix(manifest, injected.arrays())


def three(folder: Path, model: PreTrainedModel) -> list[Prefix]:
    return [filed(folder, strong(model, length, seed)) for seed, length in ((1, 6), (2, 3), (3, 8))]


def made(kind: str, prefixes: Any, model: PreTrainedModel, **options: Any) -> Any:
    if kind == "static":
        return static_cache(prefixes, model, 64, **options)
    return dynamic_cache(prefixes, model, **options)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", FULL)
def test_a_batch_with_a_prefix_for_each_row(family: str, kind: str, backbone_folder: Folder) -> None:
    folder = backbone_folder(family)
    model, rows = model_in(folder), prompts()
    prefixes = three(folder, model)
    text = text_behind(prefixes, model, **padded(rows))
    with torch.no_grad():
        logits = model(**text, past_key_values=made(kind, prefixes, model)).logits
        written = model.generate(**text, past_key_values=made(kind, prefixes, model), **GREEDY)
        for found, new, row, prefix in zip(logits, written, rows, prefixes, strict=True):
            own = key_value_prefix(prefix)
            assert (found[-len(row) :] - alone(model, row, own)).abs().max() <= TOLERANCE
            assert (found[-len(row) :] - alone(model, row, None)).abs().max() > EFFECT
            assert torch.equal(new[-STEPS:], greedy(model, row, own, STEPS)[0])


def test_text_padded_on_the_right_and_a_row_without_a_prefix(backbone_folder: Folder) -> None:
    folder = backbone_folder("llama")
    model, rows = model_in(folder), prompts()
    prefixes = [three(folder, model)[0], None, three(folder, model)[2]]
    with torch.no_grad():
        text = text_behind(prefixes, model, **padded(rows, "right"))
        logits = model(**text, past_key_values=dynamic_cache(prefixes, model)).logits
        for found, row, prefix in zip(logits, rows, prefixes, strict=True):
            own = None if prefix is None else key_value_prefix(prefix)
            assert (found[: len(row)] - alone(model, row, own)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beam_search(family: str, kind: str, backbone_folder: Folder) -> None:
    folder = backbone_folder(family)
    model = model_in(folder)
    row = prompts()[0][None].expand(2, -1)
    prefixes = three(folder, model)[:2]
    beams: dict[str, Any] = {**GREEDY, "num_beams": 3}
    cache = made(kind, prefixes, model, beams=3)
    found = model.generate(**text_behind(prefixes, model, row), past_key_values=cache, **beams)
    bare = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **beams)
    for index, prefix in enumerate(prefixes):
        attach(model, prefix)
        oracle = model.generate(input_ids=row[:1], attention_mask=torch.ones_like(row[:1]), **beams)
        detach(model)
        assert torch.equal(found[index], oracle[0])
        assert not torch.equal(found[index], bare[index])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", SLIDING)
def test_sliding_windows_see_a_prefix_that_no_padding_pushes_out(
    family: str, kind: str, backbone_folder: Folder
) -> None:
    folder = backbone_folder(family)
    model, row = model_in(folder), prompts()[1][None]
    rows, prefixes = torch.cat([row, row, row]), three(folder, model)
    with torch.no_grad():
        text = text_behind(prefixes, model, rows)
        logits = model(**text, past_key_values=made(kind, prefixes, model)).logits
        written = model.generate(**text, past_key_values=made(kind, prefixes, model), **GREEDY)
        for found, new, prefix in zip(logits, written, prefixes, strict=True):
            own = key_value_prefix(prefix)
            assert (found - alone(model, row[0], own)).abs().max() <= TOLERANCE
            assert (found - alone(model, row[0], None)).abs().max() > EFFECT
            assert torch.equal(new[-STEPS:], greedy(model, row[0], own, STEPS)[0])
    with pytest.raises(BackboneError, match="expected text without padding under a sliding window; found padding"):
        text_behind(prefixes, model, **padded(prompts()))


def test_a_prefix_as_long_as_a_window_is_refused(backbone_folder: Folder) -> None:
    folder = backbone_folder("mistral_window")
    model = model_in(folder)
    with pytest.raises(BackboneError, match="window would swallow"):
        dynamic_cache(filed(folder, strong(model, 16, 1)), model)


def test_alibi_and_its_static_cache(backbone_folder: Folder) -> None:
    folder = backbone_folder("bloom")
    model, rows = model_in(folder), prompts()
    prefix = filed(folder, strong(model, 6, 1))
    text = text_behind(prefix, model, **padded(rows))
    with torch.no_grad():
        logits = model(**text, past_key_values=dynamic_cache(prefix, model, batch=3)).logits
        for found, row in zip(logits, rows, strict=True):
            assert (found[-len(row) :] - alone(model, row, key_value_prefix(prefix))).abs().max() <= TOLERANCE
    with pytest.raises(BackboneError, match="reads a static cache; found ALiBi; use dynamic_cache"):
        static_cache(prefix, model, 64)


def test_text_that_starts_elsewhere_and_a_prompt(backbone_folder: Folder) -> None:
    folder = backbone_folder("llama")
    model, rows = model_in(folder), padded(prompts())
    elsewhere = replace(strong(model, 6, 1), positions=Positions(text_start=0, prefix_takes_positions=False))
    vectors = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) * 3
    prompt = EmbeddingPrompt(embeddings=vectors, positions=Positions(text_start=6))
    for injected in (elsewhere, prompt):
        prefix = filed(folder, injected)
        text = text_behind(prefix, model, **rows)
        with torch.no_grad():
            found = model(**text, past_key_values=dynamic_cache(prefix, model, batch=3)).logits
            bare = model(**rows).logits
            attach(model, prefix)
            expected = model(**rows).logits
            detach(model)
        written = model.generate(**text, past_key_values=dynamic_cache(prefix, model, batch=3), **GREEDY)
        attach(model, prefix)
        oracle = model.generate(**rows, **GREEDY)
        detach(model)
        real = rows["attention_mask"].bool()
        assert (found - expected)[real].abs().max() <= TOLERANCE
        assert (found - bare)[real].abs().max() > EFFECT
        assert torch.equal(written, oracle)


def filled(model: PreTrainedModel, kind: str, batch: dict[str, Tensor]) -> Any:
    cache: Any = StaticCache(config=model.config, max_cache_len=64) if kind == "static" else DynamicCache()
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**batch, position_ids=positions, past_key_values=cache)
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_context_captured_from_a_cache(family: str, kind: str, backbone_folder: Folder, tmp_path: Path) -> None:
    folder = backbone_folder(family)
    model, rows, question = model_in(folder), prompts(), prompts()[0]
    batch = padded(rows)
    cache = filled(model, kind, batch)
    for row, context in enumerate(rows):
        prefix = import_cache(cache, model, row=row, attention_mask=batch["attention_mask"])
        assert prefix.manifest.injections[0].length == len(context)
        with torch.no_grad():
            whole = model(input_ids=torch.cat([context, question])[None]).logits[0, len(context) :]
            bare = model(input_ids=question[None]).logits[0]
            found = attach(model, prefix)(input_ids=question[None]).logits[0]
            detach(model)
        assert (found - whole).abs().max() <= TOLERANCE
        assert (found - bare).abs().max() > EFFECT
    saved = save(prefix, tmp_path / "p")
    assert saved.manifest.backbone == load_backbone(folder).identity
    assert load(tmp_path / "p").manifest.provenance.config == {"imported_from": "transformers"}
    with pytest.raises(MismatchError, match="weights hash"):
        dynamic_cache(prefix, model_in(backbone_folder(family, 1)))
    dynamic_cache(prefix, model_in(backbone_folder(family, 1)), allow_mismatch=True)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_there_and_back_bit_for_bit(kind: str, backbone_folder: Folder) -> None:
    folder = backbone_folder("llama")
    model = model_in(folder)
    prefixes = three(folder, model)
    mask = text_behind(prefixes, model, torch.zeros(3, 0, dtype=torch.long))["attention_mask"]
    cache = made(kind, prefixes, model)
    for row, prefix in enumerate(prefixes):
        back = import_cache(cache, model, row=row, attention_mask=mask)
        assert {difference.where.split("/")[1] for difference in compare(prefix, back)} == {"provenance"}


def test_captures_that_are_refused(backbone_folder: Folder) -> None:
    model = model_in(backbone_folder("llama"))
    batch = padded(prompts())
    cache = filled(model, "dynamic", batch)
    for wrong, options, told in (
        (DynamicCache(), {}, "expected a cache that holds something; found an empty one"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), {}, "found EncoderDecoderCache"),
        (cache, {"row": 3}, "expected a row of 0 to 2; found 3"),
        (
            cache,
            {"attention_mask": batch["attention_mask"][:, 1:]},
            r"attention_mask \[3, 23\], as the cache is",
        ),
        (cache, {"attention_mask": torch.zeros(3, 23)}, "keeps something of row 0; found zeros"),
    ):
        with pytest.raises((BackboneError, ConfigError), match=told):
            import_cache(wrong, model, **options)  # type: ignore[arg-type]
    other = filled(model_in(backbone_folder("gpt2")), "dynamic", batch)
    with pytest.raises(MismatchError, match="layer 0"):
        import_cache(other, model)
    sliding = model_in(backbone_folder("gemma3"))
    gone = DynamicCache(config=sliding.config)
    with torch.no_grad():
        sliding(input_ids=prompts()[1][None], past_key_values=gone)
    with pytest.raises(BackboneError, match="every token; found a layer that kept the last 15 of 20; capture less"):
        import_cache(gone, sliding)


def test_what_has_no_place_in_a_cache_is_refused(backbone_folder: Folder) -> None:
    folder = backbone_folder("llama")
    model = model_in(folder)
    prefix = filed(folder, strong(model, 6, 1))
    with pytest.raises(ConfigError, match="expected max_cache_len above 6, the length of the prefix; found 6"):
        static_cache(prefix, model, 6)
    with pytest.raises(ConfigError, match="expected at least one; found none"):
        dynamic_cache([None], model)
    with pytest.raises(ConfigError, match="expected 2 rows, one a prefix; found 3"):
        text_behind([prefix, prefix], model, **padded(prompts()))
    with pytest.raises(MismatchError):
        dynamic_cache(prefix, model_in(backbone_folder("gpt2")))
    attach(model, prefix)
    with pytest.raises(BackboneError, match="attached already; call detach"):
        dynamic_cache(prefix, model)
