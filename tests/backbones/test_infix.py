"""Keys and values in slots of a decoder's text, against a cache that they are put into by hand, without our hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.attach import attach
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes
from prefixkit.injections.combined import NOWHERE
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.task import SLOT_ID
from tests import encoder_decoders
from tests.architectures import CONFIGS, VOCAB, WINDOW, tiny
from tests.backbones.test_decoder import wrap
from tests.encoder_decoders import random_prefixes
from tests.encoders import encoder_folder
from tests.ragged import padded, random_prefix, to_double

FAMILIES = [family for family in CONFIGS if family not in ("falcon", "bloom")]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.1
SLOTS = 3


def texts() -> list[Tensor]:
    """Slots together, slots among tokens, slots that a sliding window leaves behind, and at the front."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(1, VOCAB, (length,), generator=generator) for length in (12, 9, WINDOW + 14, 8)]
    for row, places in zip(tokens, ([4, 5, 6], [1, 3, 6], [2, 8, 9], [0, 1, 2]), strict=True):
        row[places] = SLOT_ID
    return tokens


def infix(model: PreTrainedModel, seed: int = 1) -> KeyValuePrefix:
    return replace(random_prefix(model, SLOTS, seed), positions=NOWHERE, placement="slots")


@torch.no_grad()
def by_hand(model: PreTrainedModel, row: Tensor, given: KeyValuePrefix) -> Tensor:
    """Logits [seq, vocab] of the tokens of `row`, read one by one; those at slots are zeros."""
    cache, logits, slot = DynamicCache(), torch.zeros(len(row), VOCAB, dtype=model.dtype), 0
    for place, token in enumerate(row):
        if token == SLOT_ID:
            for layer, (key, value) in enumerate(zip(given.keys, given.values, strict=True)):
                cache.update(key[None, :, slot : slot + 1], value[None, :, slot : slot + 1], layer)
            slot += 1
            continue
        mask, position = torch.ones(1, place + 1, dtype=torch.long), torch.tensor([[place]])
        asked = {"input_ids": token[None, None], "attention_mask": mask, "position_ids": position}
        logits[place] = model(**asked, past_key_values=cache).logits[0, -1]
    return logits


def furthest(one: Tensor, other: Tensor, row: Tensor) -> float:
    """The largest difference at the tokens of `row`."""
    return (one - other)[row != SLOT_ID].abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("gpt2", torch.float64), ("llama", torch.float64)],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_ragged_batch_equals_a_cache_with_the_infix_in_it(
    family: str, dtype: torch.dtype, side: str
) -> None:
    model = tiny(family).to(dtype)
    given, another = infix(model), infix(model, seed=2)
    if dtype == torch.float64:
        given, another = to_double(given), to_double(another)
    expected = [by_hand(model, row, given) for row in texts()]
    decoder, (ids, mask) = wrap(model), padded(texts(), side).values()
    found, other = decoder.logits(ids, mask, given), decoder.logits(ids, mask, another)
    for index, row in enumerate(texts()):
        real = mask[index].bool()
        alone = decoder.logits(row[None], None, given)[0]
        assert furthest(found[index][real], expected[index], row) <= TOLERANCE[dtype]
        assert furthest(alone, expected[index], row) <= TOLERANCE[dtype]
        assert furthest(other[index][real], expected[index], row) > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_stands_before_a_slot_does_not_see_it(family: str) -> None:
    decoder, (row, *_) = wrap(tiny(family)), texts()
    bare = decoder.logits(row[None, :4])[0]
    one, other = (decoder.logits(row[None], None, infix(decoder.model, seed))[0] for seed in (1, 2))
    assert (one[:4] - bare).abs().max() <= TOLERANCE[torch.float32]
    assert (other[:4] - bare).abs().max() <= TOLERANCE[torch.float32]
    assert ((one - other)[7:].abs().amax(dim=1) > EFFECT).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_order_of_slots_matters_only_where_a_token_stands_between(family: str) -> None:
    decoder, (together, among, *_) = wrap(tiny(family)), texts()
    given = infix(decoder.model)
    turned = replace(given, keys=tuple(k.flip(1) for k in given.keys), values=tuple(v.flip(1) for v in given.values))
    same, other = (
        furthest(decoder.logits(row[None], None, given)[0], decoder.logits(row[None], None, turned)[0], row)
        for row in (together, among)
    )
    assert same <= TOLERANCE[torch.float32]
    assert other > EFFECT


def gradients(family: str, *, checkpointing: bool) -> list[Tensor]:
    """Of each layer's keys and values, [kv_heads, slots, head_dim], for a loss at the end of each row."""
    decoder = wrap(tiny(family))
    given = infix(decoder.model)
    parts = [part.requires_grad_() for part in (*given.keys, *given.values)]
    if checkpointing:
        decoder.model.train()
        decoder.model.gradient_checkpointing_enable()
    ids, mask = padded(texts()).values()
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 7
    decoder.target_logits(ids, mask, labels, given).log_softmax(dim=-1)[:, 7].sum().backward()
    return [part.grad for part in parts if part.grad is not None]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_key_and_value_of_every_slot_has_a_gradient(family: str) -> None:
    """The same one with gradient checkpointing, whose layers run again when the pass is over."""
    plain, again = (gradients(family, checkpointing=checkpointing) for checkpointing in (False, True))
    assert len(plain) == 4
    for one, other in zip(plain, again, strict=True):
        assert (one.abs().amax(dim=(0, 2)) > 1e-6).all()
        assert (one - other).abs().max() <= TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window", "gemma3", "opt"])
def test_writing_with_a_cache_equals_whole_passes(family: str) -> None:
    """Far enough for a sliding window to pass the slots."""
    decoder, steps = wrap(tiny(family)), WINDOW + 2
    given, another = infix(decoder.model), infix(decoder.model, seed=2)
    rows = [row.tolist() for row in texts()]
    written = decoder.generate(rows, given, stop=(), max_new_tokens=steps)
    for row, tokens in zip(rows, written, strict=True):
        whole = torch.tensor([row + tokens])
        assert decoder.logits(whole, None, given)[0, len(row) - 1 : -1].argmax(dim=-1).tolist() == tokens
    assert written != decoder.generate(rows, another, stop=(), max_new_tokens=steps)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral_window"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_infix_that_a_real_text_left_is_written_behind_like_that_text(family: str, beams: int) -> None:
    """With the keys and values that tokens have behind this very input, the slots are those tokens; in every beam."""
    model, (row, *_) = tiny(family), texts()
    said = torch.where(row == SLOT_ID, torch.arange(40, 40 + len(row)), row)
    cache = DynamicCache()
    model(input_ids=said[None], past_key_values=cache)
    keys, values = ([getattr(layer, which)[0, :, 4:7] for layer in cache.layers] for which in ("keys", "values"))
    given = replace(infix(model), keys=tuple(keys), values=tuple(values))
    plain = model.generate(said[None], max_new_tokens=9, num_beams=beams, do_sample=False, eos_token_id=None)
    decoder = wrap(model)
    how = {"stop": (), "max_new_tokens": 9, "num_beams": beams}
    assert decoder.generate([row.tolist()], given, **how) == [plain[0, len(row) :].tolist()]
    rows = [each.tolist() for each in texts()]
    written = decoder.generate(rows, given, **how)
    assert written == [decoder.generate([each], given, **how)[0] for each in rows]
    assert written[0] != decoder.generate(rows[:1], infix(model), **how)[0]


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_a_model_that_takes_prefixes_through_its_cache_is_refused(family: str) -> None:
    decoder, (row, *_) = wrap(tiny(family)), texts()
    given = infix(decoder.model)
    for refused in (
        lambda: decoder.refuse_unplaceable(given),
        lambda: decoder.logits(row[None], None, given),
        lambda: decoder.generate([row.tolist()], given, stop=(), max_new_tokens=1),
    ):
        with pytest.raises(BackboneError, match="attention registry for keys and values in slots of the text"):
            refused()


def test_encoders_and_encoder_decoders_are_refused(tmp_path: Path) -> None:
    pair = encoder_decoders.tiny("bart")
    parts = random_prefixes(encoder_decoders.wrap(pair)).parts
    among = KeyValuePrefixes(parts=tuple(replace(part, placement="slots") for part in parts))
    with pytest.raises(BackboneError, match=r"prefixes before the text; found \w+\.\w+ in slots"):
        attach(encoder_decoders.tiny("bart"), among)
    with pytest.raises(BackboneError, match=r"prefixes before the text; found \w+\.\w+ in slots"):
        encoder_decoders.wrap(pair).fold(among)
    encoder = load_backbone(encoder_folder("bert", tmp_path))
    with pytest.raises(MismatchError, match="a prefix of an encoder, before its text; found one in slots"):
        encoder.fold(replace(infix(tiny("gpt2")), stack="encoder"))


def test_what_does_not_fit_is_refused() -> None:
    decoder, (row, *_) = wrap(tiny("gpt2")), texts()
    given = infix(decoder.model)
    with pytest.raises(MismatchError, match="expected 3 slots in every text; found 2 to 2"):
        decoder.logits(row[None, :6], None, given)
    assert decoder.logits(torch.tensor([[5, 6]])).shape == (1, 2, VOCAB)
    model = decoder.release()
    for each in (given, PrefixTuning(given)):
        with pytest.raises(BackboneError, match="expected a prefix before the text; found one in slots of the text"):
            attach(model, each)
