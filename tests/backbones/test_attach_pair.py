"""Prefixes on encoder-decoders in one's own loop: by hand, with gradients, in `Trainer`, as a file, and off again."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.identity import memory_digest
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.snapshot import snapshot
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import Positions
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import EmbeddingPrompt, KeyValuePrefixes, injection
from prefixkit.methods.prefix_tuning import PrefixesTuning, PrefixTuning
from prefixkit.prefix import load, save
from tests.architectures import tiny as tiny_decoder
from tests.encoder_decoders import CONFIGS, END, folder_of, oracle, random_prefixes, tiny, wrap
from tests.ragged import padded, prompts
from tests.ragged import random_prefix as random_decoder_prefix

TOLERANCE = 1e-5
EFFECT = 0.1
WRITTEN = torch.tensor([[END, 11, 12, 13, 14, 15]])


def prefixes(family: str, places: Any = ATTENTIONS) -> KeyValuePrefixes:
    return random_prefixes(wrap(tiny(family)), places=places)


def method(family: str, **options: Any) -> PrefixesTuning:
    torch.manual_seed(0)
    return PrefixesTuning([PrefixTuning(part, **options) for part in prefixes(family).parts])


def batch() -> dict[str, Tensor]:
    return {**padded(prompts(), "right"), "labels": torch.arange(20, 29).reshape(3, 3)}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=prompts()[1][None], decoder_input_ids=WRITTEN).logits
    return found


@pytest.mark.parametrize("places", [*((place,) for place in ATTENTIONS), ATTENTIONS], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_each_prefix_equals_attention_by_hand_and_comes_off_again(family: str, places: Any) -> None:
    # In float32 some processors round further than that.
    model = tiny(family).double()
    received, bare = random_prefixes(wrap(model), places=places), logits(model)
    expected = logits(oracle(model, received))
    assert (logits(attach(model, received)) - expected).abs().max() <= TOLERANCE
    assert (expected - bare).abs().max() > EFFECT
    assert torch.equal(logits(detach(model)), bare)
    assert list(model.state_dict()) == list(tiny(family).state_dict())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_generate_writes_what_a_loaded_backbone_writes(family: str, beams: int) -> None:
    backbone, model = wrap(tiny(family)), attach(tiny(family), prefixes(family))
    rows = [row.tolist() for row in prompts()]
    asked: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams}
    model.generation_config.no_repeat_ngram_size, model.generation_config.forced_bos_token_id = 0, None
    model.generation_config.forced_eos_token_id = None
    found = model.generate(**padded(prompts(), "right"), do_sample=False, eos_token_id=END, pad_token_id=END, **asked)
    expected = backbone.generate(rows, prefixes(family), stop=[END], **asked)
    ends = [[*row.tolist(), END].index(END) for row in found[:, 1:]]
    assert [row[1 : 1 + end].tolist() for row, end in zip(found, ends, strict=True)] == expected


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_every_slot_learns_and_no_weight_does(family: str, reparameterization: str) -> None:
    model = attach(tiny(family), method(family, reparameterization=reparameterization, hidden=8, paper_start=True))
    with torch.no_grad():
        made = model.prefixkit()
    leaves = [tensor.requires_grad_() for part in made.parts for tensor in (*part.keys, *part.values)]
    with wrap(tiny(family)).injected(made) as by_backbone:
        by_backbone(**batch()).loss.backward()
    assert all((leaf.grad.abs().amax(dim=(0, 2)) > 0).all() for leaf in leaves if leaf.grad is not None)
    assert all(leaf.grad is not None for leaf in leaves)
    model(**batch()).loss.backward()
    own = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert own == {f"prefixkit.{name}" for name, _ in model.prefixkit.named_parameters()}
    if reparameterization == "none":
        expected = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None]).abs().sum()
        found = sum(parameter.grad.abs().sum() for parameter in model.prefixkit.parameters())
        assert found == pytest.approx(expected.item(), rel=1e-4)
    detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_gradient_checkpointing_changes_nothing_and_the_reentrant_kind_is_refused(family: str) -> None:
    plain, checkpointed = (attach(tiny(family).train(), method(family)) for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        model.config.dropout = model.config.dropout_rate = 0.0
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        model(**batch()).loss.backward()
    pairs = zip(plain.prefixkit.parameters(), checkpointed.prefixkit.parameters(), strict=True)
    assert all((one.grad - other.grad).abs().max() <= 1e-6 for one, other in pairs)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(BackboneError, match="use_reentrant=False under a prefix"):
        checkpointed(**batch())


def test_copies_and_pickles_have_a_prefix_of_their_own() -> None:
    model = attach(tiny("t5"), prefixes("t5"))
    expected = logits(model)
    copies = (deepcopy(model), pickle.loads(pickle.dumps(model)))
    bare = logits(detach(model))
    for copied in copies:
        assert torch.equal(logits(copied), expected)
        assert torch.equal(logits(detach(copied)), bare)


@pytest.mark.parametrize("family", ["bart_uneven", "t5_uneven"])
def test_trainer_trains_the_prefixes_alone_and_a_snapshot_is_their_file(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path / "backbone")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    weights = memory_digest(model)
    attach(model, method(family))
    before = model(**batch()).loss.item()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Seq2SeqTrainer(model, arguments, train_dataset=[0, 1, 2], data_collator=lambda rows: batch()).train()
    model.eval()
    assert model(**batch()).loss.item() < before - 0.1
    assert memory_digest(model) == weights
    expected = logits(model)
    save(snapshot(model), tmp_path / "p")
    fresh = attach(AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32), load(tmp_path / "p"))
    assert torch.equal(logits(fresh), expected)
    backbone = load_backbone(folder)
    found = backbone.logits(prompts()[1][None], None, WRITTEN, injection(load(tmp_path / "p")))
    assert torch.equal(found.detach(), expected)
    assert load(tmp_path / "p").manifest.backbone == backbone.identity


def test_a_file_of_other_weights_and_prefixes_of_other_shapes_are_refused(tmp_path: Path) -> None:
    one, other = (folder_of("t5", tmp_path / str(seed), seed) for seed in (0, 1))
    model = attach(AutoModelForSeq2SeqLM.from_pretrained(one, dtype=torch.float32), prefixes("t5"))
    prefix = snapshot(model)
    stranger = AutoModelForSeq2SeqLM.from_pretrained(other, dtype=torch.float32)
    with pytest.raises(MismatchError, match="weights"):
        attach(stranger, prefix)
    attach(stranger, prefix, allow_mismatch=True)
    with pytest.raises(MismatchError, match=r"encoder\.self of layers .*; use the backbone that the prefixes were"):
        attach(tiny("t5_uneven"), prefixes("t5", (("encoder", "self"),)))


def test_what_has_no_place_in_its_attention_is_refused() -> None:
    model, (part,) = tiny("t5"), prefixes("t5", (("decoder", "self"),)).parts
    prompt = EmbeddingPrompt(embeddings=torch.ones(4, 64), positions=Positions(text_start=4), stack="encoder")
    for received, found in ((prompt, "an? EmbeddingPrompt"), (random_decoder_prefix(tiny_decoder("gpt2")), "a KeyVal")):
        with pytest.raises(BackboneError, match=f"expected prefixes for an encoder-decoder; found {found}"):
            attach(model, received)
    shifted = KeyValuePrefixes(parts=(type(part)(**{**vars(part), "positions": Positions(text_start=6)}),))
    with pytest.raises(BackboneError, match=r"take no positions; found decoder\.self with text that starts at 6"):
        attach(model, shifted)
    attach(model, prefixes("t5"))
    with pytest.raises(BackboneError, match="a prefix that is attached already"):
        attach(model, prefixes("t5"))


def test_a_backbone_in_use_is_released_first() -> None:
    backbone = wrap(tiny("t5"))
    with backbone.injected(prefixes("t5")):
        pass
    with pytest.raises(BackboneError, match=r"a loaded backbone is using; call release\(\)"):
        attach(backbone.model, prefixes("t5"))
    attach(backbone.release(), prefixes("t5"))
