"""`attach` and `detach`: what a model computes with a prefix, what its gradients are, and that nothing else changes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, PreTrainedModel

from prefixkit.backbones.attach import attach, detach
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.injections import KeyValuePrefix
from prefixkit.methods.prefix_tuning import PrefixTuning
from prefixkit.prefix import load, save
from tests.architectures import tiny
from tests.ragged import alone, labelled, padded, prompts, random_prefix, to_double

FAMILIES = ["gpt2", "llama", "gemma3", "falcon", "bloom"]
TOLERANCE = 1e-5
EFFECT = 0.1


class Free(nn.Module):
    """A method whose parameters are the prefix itself, in any dtype."""

    def __init__(self, prefix: KeyValuePrefix) -> None:
        super().__init__()
        self.keys = nn.ParameterList(prefix.keys)
        self.values = nn.ParameterList(prefix.values)
        self.positions = prefix.positions

    def forward(self) -> KeyValuePrefix:
        return KeyValuePrefix(keys=tuple(self.keys), values=tuple(self.values), positions=self.positions)


def logits(model: PreTrainedModel, batch: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(batch or padded(prompts())), **options).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_get_what_they_get_alone(family: str, side: str) -> None:
    model, rows = tiny(family), prompts()
    prefix = random_prefix(model)
    expected = [alone(model, row, prefix) for row in rows]
    bare = [alone(model, row, None) for row in rows]
    batch = padded(rows, side)
    found = logits(attach(model, prefix), batch)
    for index, mask in enumerate(batch["attention_mask"].bool()):
        assert (found[index][mask] - expected[index]).abs().max() <= TOLERANCE
        assert (found[index][mask] - bare[index]).abs().max() > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_reach_the_whole_prefix_and_no_weight(family: str, side: str) -> None:
    model = tiny(family)
    attach(model, Free(random_prefix(model)))
    model(**labelled(padded(prompts(), side))).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("prefixkit."):
            # Every slot of every head of every layer.
            assert (parameter.grad.abs().amax(dim=-1) > 0).all(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_rows_alone(family: str, side: str) -> None:
    model, rows = tiny(family), prompts()
    method = Free(random_prefix(model))
    sum(nll(alone(model, row, method()), row) for row in rows).backward()
    expected = [parameter.grad for parameter in method.parameters()]
    method.zero_grad()
    batch = padded(rows, side)
    found = attach(model, method)(**batch).logits
    sum(nll(found[index][mask.bool()], rows[index]) for index, mask in enumerate(batch["attention_mask"])).backward()
    for parameter, grad in zip(method.parameters(), expected, strict=True):
        assert (parameter.grad - grad).abs().max() <= TOLERANCE * max(1.0, grad.abs().max().item())


def nll(logits: Tensor, row: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum")


def test_gradients_are_finite_differences() -> None:
    # GPT-2 computes in float64 throughout; other families go through float32 in their norms.
    model, row = tiny("gpt2").double(), prompts()[1]
    method = Free(to_double(random_prefix(model)))
    attach(model, method)
    nll(model(input_ids=row[None]).logits[0], row).backward()
    for tensor in (method.keys[0], method.keys[1], method.values[0], method.values[1]):
        for entry in ((0, 0, 0), (-1, 3, 5), (0, -1, -1)):
            losses = []
            with torch.no_grad():
                for move in (1e-5, -2e-5, 1e-5):
                    tensor[entry] += move
                    losses.append(nll(model(input_ids=row[None]).logits[0], row).item())
            assert abs(tensor.grad[entry].item() - (losses[0] - losses[1]) / 2e-5) <= 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_gives_the_model_back(family: str) -> None:
    model = tiny(family)
    next(model.parameters()).requires_grad = False
    before, keys, attention = logits(model), list(model.state_dict()), model.config._attn_implementation
    trained = [parameter.requires_grad for parameter in model.parameters()]
    attach(model, PrefixTuning(random_prefix(model)))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "prefixkit.prefix.prefix"
    }
    assert (logits(model) - before).abs().max() > EFFECT
    assert detach(model) is model
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert model.config._attn_implementation == attention
    with pytest.raises(BackboneError, match="expected an attached prefix; found none"):
        detach(model)


def test_without_freezing_the_backbone_learns_too() -> None:
    model = tiny("gpt2")
    attach(model, PrefixTuning(random_prefix(model)), freeze=False)
    model(**labelled(padded(prompts()))).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_fixed_prefix_has_no_parameters_and_moves_with_the_model() -> None:
    model = tiny("llama")
    keys = list(model.state_dict())
    attach(model, random_prefix(model))
    assert list(model.state_dict()) == keys
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.bfloat16().prefixkit().keys[0].dtype == torch.bfloat16


def test_two_models_do_not_disturb_each_other() -> None:
    models = [tiny("llama"), tiny("llama"), tiny("gpt2")]
    alone_each = [logits(attach(model, random_prefix(model, seed=seed))) for seed, model in enumerate(models)]
    assert (alone_each[0] - alone_each[1]).abs().max() > EFFECT
    for _ in range(2):
        for model, expected in zip(models, alone_each, strict=True):
            assert torch.equal(logits(model), expected)
    bare = logits(tiny("llama"))
    assert torch.equal(logits(detach(models[0])), bare)
    assert torch.equal(logits(models[1]), alone_each[1])


def test_a_copy_has_its_own_prefix() -> None:
    model = attach(tiny("llama"), PrefixTuning(random_prefix(tiny("llama"))))
    model(**labelled(padded(prompts()))).loss.backward()
    expected, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    nn.init.zeros_(twin.prefixkit.prefix.prefix)
    assert not torch.equal(logits(twin), expected)
    detach(twin)
    assert torch.equal(logits(twin), logits(tiny("llama")))
    assert torch.equal(logits(model), expected)


def test_a_pickled_model_works_in_another_process(tmp_path: Path) -> None:
    model = attach(tiny("llama"), PrefixTuning(random_prefix(tiny("llama"))))
    torch.save(model, tmp_path / "model.pt")
    torch.save((padded(prompts()), logits(model)), tmp_path / "logits.pt")
    program = """
import sys, torch
torch.set_num_threads(1)
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
batch, expected = torch.load(sys.argv[1] + "/logits.pt")
assert torch.equal(model(**batch).logits, expected)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)


def test_positions_of_the_caller_count_the_text() -> None:
    model = attach(tiny("gpt2"), random_prefix(tiny("gpt2")))
    batch = padded(prompts())
    given = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(logits(model, batch, position_ids=given), logits(model, batch))


def test_packed_texts_do_not_see_each_other() -> None:
    model, rows = tiny("mistral_window"), prompts()
    attach(model, random_prefix(model))
    expected = torch.cat([logits(model, {"input_ids": row[None]})[0] for row in rows])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = {"input_ids": torch.cat(rows)[None], "position_ids": positions}
    assert (logits(model, packed, use_cache=False)[0] - expected).abs().max() <= TOLERANCE


def test_masks_of_four_dimensions_and_positional_arguments() -> None:
    model, row = tiny("gpt2"), prompts()[1][None]
    attach(model, random_prefix(model))
    expected = logits(model, {"input_ids": row})
    square = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool).tril()[None, None]
    assert (logits(model, {"input_ids": row}, attention_mask=square) - expected).abs().max() <= TOLERANCE
    batch = padded(prompts())
    with torch.no_grad():
        named = model.transformer(**batch).last_hidden_state
        by_place = model.transformer(batch["input_ids"], None, batch["attention_mask"]).last_hidden_state
    assert torch.equal(named, by_place)


def test_classification_heads() -> None:
    config = tiny("gpt2").config
    config.num_labels = 3
    torch.manual_seed(0)
    model, rows = AutoModelForSequenceClassification.from_config(config).eval(), prompts()
    bare = logits(model)
    attach(model, PrefixTuning(random_prefix(model)))
    expected = torch.cat([logits(model, {"input_ids": row[None]}) for row in rows])
    assert (logits(model) - expected).abs().max() <= TOLERANCE
    assert (expected - bare).abs().max() > 0.01
    model(**padded(rows), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.prefixkit.prefix.prefix.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "bloom"])
def test_half_precision_keeps_the_prefix_in_float32(family: str) -> None:
    model = tiny(family)
    prefix = random_prefix(model)
    exact = logits(attach(model, prefix))
    real = padded(prompts())["attention_mask"].bool()
    half = attach(tiny(family).bfloat16(), PrefixTuning(prefix))
    assert (logits(half) - exact)[real].abs().max() <= 0.05
    half(**labelled(padded(prompts()))).loss.backward()
    assert half.prefixkit.prefix.prefix.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model) - exact)[real].abs().max() <= 0.05


def test_weights_kept_elsewhere_by_accelerate() -> None:
    from accelerate import cpu_offload

    model = tiny("llama")
    prefix = random_prefix(model)
    expected = logits(attach(model, prefix))
    offloaded = cpu_offload(tiny("llama"), execution_device="cpu")
    assert torch.equal(logits(attach(offloaded, prefix)), expected)


def test_only_one_prefix() -> None:
    model = tiny("llama")
    prefix = random_prefix(model)
    attach(model, prefix)
    with pytest.raises(BackboneError, match=r"found a prefix that is attached already; call detach\(model\) first"):
        attach(model, prefix)
    detach(model)
    attach(model, prefix)


def test_a_backbone_in_use_is_released_first(backbone_folder: Callable[..., Path]) -> None:
    backbone = load_backbone(backbone_folder("llama"))
    start = backbone.key_values_of([5, 6, 7])
    with pytest.raises(BackboneError, match=r"call release\(\) on that backbone first"):
        attach(backbone.model, start)
    attach(backbone.release(), start)


def test_a_shared_configuration() -> None:
    config = tiny("llama").config
    model, twin = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before = logits(twin)
    attach(model, random_prefix(model))
    assert torch.equal(logits(twin), before)
    with pytest.raises(BackboneError, match="expected a configuration of its own"):
        attach(twin, random_prefix(model))


def test_other_shapes_are_refused() -> None:
    model = tiny("llama")
    prefix = random_prefix(model)
    shallow = replace(prefix, keys=prefix.keys[:1], values=prefix.values[:1])
    with pytest.raises(MismatchError, match="expected 2 layers; found 1"):
        attach(model, shallow)
    wide = replace(prefix, keys=(prefix.keys[0], torch.cat([prefix.keys[1]] * 2)), values=prefix.values)
    with pytest.raises(MismatchError, match=r"layer 1 .*\(2, 16, 16\); found \(4, 16, 16\)"):
        attach(model, wide)
    with pytest.raises(MismatchError, match="layer 0"):
        attach(tiny("gpt2"), prefix)
    assert not hasattr(model, "prefixkit")


def test_prefixes_that_leave_no_room_are_refused() -> None:
    with pytest.raises(BackboneError, match="room in the model's 128 positions; found text that starts at 128"):
        attach(tiny("gpt2"), random_prefix(tiny("gpt2"), 128))
    with pytest.raises(BackboneError, match="window would swallow"):
        attach(tiny("mistral_window"), random_prefix(tiny("mistral_window"), 16))
    attach(tiny("bloom"), random_prefix(tiny("bloom"), 200))


def test_other_attention_implementations_are_refused() -> None:
    model = tiny("llama")
    prefix = random_prefix(model)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(BackboneError, match="sdpa or eager under a prefix; found flex_attention"):
        attach(model, prefix)


def test_eager_attention_shows_the_prefix_in_its_weights() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    batch = padded(prompts())
    attach(model, random_prefix(model))
    assert model(**batch, output_attentions=True).attentions[0].shape == (3, 4, 23, 29)


def test_attach_in_training_mode_leaves_modes_and_random_numbers_alone() -> None:
    config = tiny("gpt2").config
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.3
    model = AutoModelForCausalLM.from_config(config).train()
    model.lm_head.eval()
    modes, numbers = [module.training for module in model.modules()], torch.random.get_rng_state()
    prefix = random_prefix(model)
    attach(model, prefix)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert [module.training for module in model.modules() if module is not model.prefixkit] == modes
    torch.manual_seed(5)
    first, second = logits(model), logits(model)
    torch.manual_seed(5)
    assert torch.equal(logits(model), first)
    assert not torch.equal(first, second)


def test_a_file_is_checked_against_its_backbone(backbone_folder: Callable[..., Path], tmp_path: Path) -> None:
    from prefixkit.backbones.snapshot import snapshot

    model = AutoModelForCausalLM.from_pretrained(backbone_folder("llama"), dtype=torch.float32)
    with pytest.raises(BackboneError, match="expected an attached prefix; found none"):
        snapshot(model)
    attach(model, PrefixTuning(random_prefix(model)))
    expected = logits(model)
    save(snapshot(model), tmp_path / "prefix.safetensors")
    prefix = load(tmp_path / "prefix.safetensors")
    assert prefix.manifest.backbone.weights_hash == load_backbone(backbone_folder("llama")).identity.weights_hash
    assert torch.equal(logits(attach(detach(model), prefix)), expected)
    other = AutoModelForCausalLM.from_pretrained(backbone_folder("llama", 1), dtype=torch.float32)
    with pytest.raises(MismatchError, match="weights hash"):
        attach(other, prefix)
    attach(other, prefix, allow_mismatch=True)
    in_memory = attach(tiny("llama"), prefix)
    with pytest.raises(BackboneError, match="loaded from a folder or the hub; found one built in memory"):
        snapshot(in_memory)
