"""A prefix on encoders: equal to a concatenation by hand, in both directions, with nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
    DebertaV2Config,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.encoder_layers import key_values_in, measure_encoder
from prefixkit.backbones.heads import read
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.snapshot import snapshot
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt, KeyValuePrefix, TaskHead, injection, part_of
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.prefix import load, save
from tests.encoders import CONFIGS, TEXT, encoder_folder, one_batch, tiny_encoder

LENGTH = 5
TOLERANCE = 1e-5
EFFECT = 0.1
_BY_HAND: dict[str, Any] = {}


def by_hand(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    """The oracle: softmax over the prefix's keys and the input's, layer by layer in the order of the calls."""
    prefix, layer = _BY_HAND["prefix"], _BY_HAND["calls"]
    _BY_HAND["calls"] += 1
    batch = query.shape[0]
    keys = torch.cat([prefix.keys[layer].to(key.dtype).repeat(batch, 1, 1, 1), key], dim=2)
    values = torch.cat([prefix.values[layer].to(key.dtype).repeat(batch, 1, 1, 1), value], dim=2)
    scores = query @ keys.transpose(2, 3) * scaling
    if mask is not None:
        scores[..., prefix.length :] += torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ values).transpose(1, 2), None


AttentionInterface.register("by_hand", by_hand)
AttentionMaskInterface.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def oracle(model: PreTrainedModel, prefix: KeyValuePrefix) -> Iterator[PreTrainedModel]:
    _BY_HAND.update(prefix=prefix, calls=0)
    model.set_attn_implementation("by_hand")
    yield model
    model.set_attn_implementation("sdpa")


def random_prefix(family: str, length: int = LENGTH) -> KeyValuePrefix:
    generator = torch.Generator().manual_seed(1)
    layers = measure_encoder(tiny_encoder(family))
    offset = family in TEXT
    return KeyValuePrefix(
        keys=tuple(torch.randn(layer.kv_heads, length, layer.key_dim, generator=generator) for layer in layers),
        values=tuple(torch.randn(layer.kv_heads, length, layer.value_dim, generator=generator) for layer in layers),
        positions=Positions(text_start=length if offset else 0, prefix_takes_positions=offset),
        stack="encoder",
    )


def placed(family: str, prefix: KeyValuePrefix, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the positions that its text has behind the prefix."""
    if family not in TEXT:
        return batch
    # RoBERTa numbers its tokens from behind its padding token.
    first = prefix.positions.text_start + (2 if family == "roberta" else 0)
    return {**batch, "position_ids": torch.arange(first, first + batch["input_ids"].shape[1])[None]}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", CONFIGS)
def test_it_equals_a_concatenation_by_hand(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model, prefix = tiny_encoder(family).to(dtype), random_prefix(family)
    batch = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in one_batch(family).items()
    }
    with oracle(model, prefix):
        expected = model(**placed(family, prefix, batch)).last_hidden_state
    bare = model(**batch).last_hidden_state
    found = attach(model, prefix)(**batch).last_hidden_state
    assert (found - expected).abs().max() <= tolerance
    assert (found - bare).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", TEXT)
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = attach(tiny_encoder(family), random_prefix(family))
    rows = [one_batch(family)["input_ids"][0, :length] for length in (9, 4)]
    ids, mask = torch.full((2, 12), 1), torch.zeros(2, 12, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        ids[index, where], mask[index, where] = row, 1
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    for index, row in enumerate(rows):
        alone = model(input_ids=row[None]).last_hidden_state[0]
        assert (found[index][mask[index].bool()] - alone).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_prefix_of_nothing_and_a_detached_one_are_the_base_model(family: str) -> None:
    model, batch = tiny_encoder(family), one_batch(family)
    before, base = memory_digest(model), model(**batch).last_hidden_state
    attach(model, random_prefix(family, length=0))
    assert torch.equal(model(**batch).last_hidden_state, base)
    detach(model)
    attach(model, random_prefix(family))
    detach(model)
    assert torch.equal(model(**batch).last_hidden_state, base)
    assert memory_digest(model) == before
    assert not any("prefixkit" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_the_oracles_and_reach_every_slot(family: str) -> None:
    model, batch, prefix = tiny_encoder(family).requires_grad_(False), one_batch(family), random_prefix(family)
    ours = replace(prefix, keys=copies(prefix.keys), values=copies(prefix.values))
    theirs = replace(prefix, keys=copies(prefix.keys), values=copies(prefix.values))
    with oracle(model, theirs):
        model(**placed(family, theirs, batch)).last_hidden_state[0, 0, :7].sum().backward()
    attach(model, PassOn(ours))(**batch).last_hidden_state[0, 0, :7].sum().backward()
    for one, other in zip([*ours.keys, *ours.values], [*theirs.keys, *theirs.values], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() <= TOLERANCE * max(1.0, other.grad.abs().max().item())
        assert (one.grad.abs().sum(dim=(0, 2)) > 0).all()


class PassOn(torch.nn.Module):
    """A method whose parameters somebody else holds."""

    def __init__(self, prefix: KeyValuePrefix) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self) -> KeyValuePrefix:
        return self.prefix


def copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize(
    ("family", "head"), [("roberta", AutoModelForTokenClassification), ("vit", AutoModelForImageClassification)]
)
def test_a_head_and_a_prefix_learn_in_ones_own_loop(family: str, head: Any) -> None:
    """P-Tuning v2 in a loop of one's own: the backbone stays, the head and the prefix learn."""
    model, batch = tiny_encoder(family, head, num_labels=3), one_batch(family)
    backbone = memory_digest(model.base_model)
    labels = batch["input_ids"] % 3 if family in TEXT else torch.tensor([2, 0])
    start = key_values_in(model, {name: tensor[:1] for name, tensor in batch.items()}, offset=family in TEXT)
    attach(model, PrefixTuning(start))
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(15):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert memory_digest(detach(model).base_model) == backbone


def test_encoders_that_cannot_be_given_a_prefix_are_refused() -> None:
    shape = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    prefix = random_prefix("bert")
    for config, message in (
        (
            DebertaV2Config(**shape, intermediate_size=48),
            "through the registry of transformers; found one that computes",
        ),
        (AlbertConfig(**shape, intermediate_size=48), "attention of all 2 layers; found 1"),
    ):
        with pytest.raises(BackboneError, match=message):
            attach(AutoModel.from_config(config).eval(), fitting(prefix, config))


def fitting(prefix: KeyValuePrefix, config: Any) -> KeyValuePrefix:
    """A prefix of the shapes of another encoder, so that these are not what is refused."""
    shape = (config.num_attention_heads, LENGTH, config.hidden_size // config.num_attention_heads)
    tensors = tuple(torch.zeros(shape) for _ in range(config.num_hidden_layers))
    return replace(prefix, keys=tensors, values=tensors)


def test_what_does_not_go_together_is_refused() -> None:
    model, prefix = tiny_encoder("bert"), random_prefix("bert")
    with pytest.raises(MismatchError, match="expected a prefix of an encoder; found one of an decoder"):
        attach(model, replace(prefix, stack="decoder"))
    prompt = EmbeddingPrompt(embeddings=torch.zeros(2, 64), positions=Positions(text_start=2))
    with pytest.raises(BackboneError, match="keys and values for an encoder; found a soft prompt"):
        attach(model, prompt)
    with pytest.raises(BackboneError, match="an input that starts at position 0"):
        attach(tiny_encoder("vit"), replace(random_prefix("vit"), positions=Positions(text_start=LENGTH)))


def test_a_snapshot_holds_prefix_and_head_and_computes_the_same(tmp_path: Path) -> None:
    folder = encoder_folder("roberta", tmp_path / "roberta")
    loaded = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3)
    model = attach(loaded, PrefixTuning(random_prefix("roberta")))
    inputs = {**one_batch("roberta"), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with torch.no_grad():
        own = model(**inputs).logits
        bare = detach(attach(deepcopy(detach(model)), random_prefix("roberta")))(**inputs).logits
    attach(model, PrefixTuning(random_prefix("roberta")))
    head = TaskHead(weight=model.classifier.weight, bias=model.classifier.bias, reads="each")
    save(snapshot(model, method="p-tuning-v2", head=head), tmp_path / "made")
    received, backbone = injection(load(tmp_path / "made")), load_backbone(folder)
    stored = part_of(received, TaskHead)
    assert stored is not None
    with torch.no_grad():
        found = read(stored, backbone.states(inputs, received))
    assert (found - own).abs().max() <= TOLERANCE
    assert (found - bare).abs().max() > EFFECT


@pytest.mark.parametrize(("family", "room"), [("bert", 64), ("roberta", 62)])
def test_a_prefix_leaves_room_for_text(family: str, room: int) -> None:
    prefix = random_prefix(family)
    attach(tiny_encoder(family), replace(prefix, positions=Positions(text_start=room - 1)))
    with pytest.raises(BackboneError, match="a prefix that leaves room"):
        attach(tiny_encoder(family), replace(prefix, positions=Positions(text_start=room)))
