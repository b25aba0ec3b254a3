"""Deep prompts against rows that are written into every layer by hand, and shallow ones against one insertion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.load import load_backbone
from prefixkit.errors import BackboneError
from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt, HiddenPrompt
from prefixkit.injections.combined import NOWHERE
from prefixkit.methods.visual_prompt_tuning import VisualPromptTuning
from tests.encoders import TEXT, encoder_folder, rows, spelled_out, together
from tests.invariants.insertion import inserted, layers_by_name, raised, replaced

Load = Callable[..., Encoder]
Plain = Callable[..., PreTrainedModel]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EFFECT = 0.1
IMAGES = ("vit", "deit", "dinov2", "dinov2_with_registers")
FAMILIES = (*IMAGES, "bert", "roberta", "electra", "distilbert")
"""Pre-LN image encoders and post-LN encoders of text."""
LENGTH, LAYERS, WIDTH = 3, 2, 64


def drawn(layers: int = LAYERS) -> Tensor:
    return torch.randn(layers, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5))


def deep(family: str, mode: str = "replace", placement: str = "after_first") -> HiddenPrompt:
    takes = family in TEXT and mode == "replace" and placement == "prepend"
    positions = Positions(text_start=LENGTH) if takes else NOWHERE
    return HiddenPrompt(hidden=tuple(drawn()), mode=mode, placement=placement, positions=positions)


def wider(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mask with the prompt's rows in it."""
    if "attention_mask" not in inputs:
        return inputs
    mask = inputs["attention_mask"]
    return {**inputs, "attention_mask": torch.cat([torch.ones_like(mask[:, :LENGTH]), mask], dim=1)}


def without(states: Tensor, begin: int) -> Tensor:
    return torch.cat([states[:, :begin], states[:, begin + LENGTH :]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("placement", ["after_first", "prepend"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_deep_prompts_are_rows_replaced_in_every_layer(
    encoder: Load, plain: Plain, family: str, dtype: torch.dtype, placement: str
) -> None:
    backbone, (row, *_), prompt = encoder(family, dtype), rows(family, dtype), deep(family, placement=placement)
    base, begin = plain(family, dtype).base_model, 1 if placement == "after_first" else 0
    asked = wider(spelled_out(family, row, prompt.positions.text_start))
    with inserted(base, torch.zeros(LENGTH, WIDTH), begin), replaced(base, prompt.hidden, begin):
        expected = without(base(**asked).last_hidden_state, begin)
    found = backbone.states(row, prompt)
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.states(row)).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", IMAGES)
def test_shallow_prompts_are_one_insertion(encoder: Load, plain: Plain, family: str, dtype: torch.dtype) -> None:
    backbone, (row, *_), vectors = encoder(family, dtype), rows(family, dtype), drawn(1)[0]
    base = plain(family, dtype).base_model
    with inserted(base, vectors, 1):
        expected = without(base(**row).last_hidden_state, 1)
    prompt = EmbeddingPrompt(embeddings=vectors, positions=NOWHERE, stack="encoder", placement="after_first")
    found = backbone.states(row, prompt)
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.states(row)).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("placement", ["after_first", "prepend"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "modernbert"])
def test_added_prompts_change_the_states_that_are_there(
    encoder: Load, plain: Plain, family: str, dtype: torch.dtype, placement: str
) -> None:
    backbone, (row, *_), prompt = encoder(family, dtype), rows(family, dtype), deep(family, "add", placement)
    base = plain(family, dtype).base_model
    # DeiT has a class token and one for distillation, DINOv2 a class token and four registers.
    special = {"deit": 2, "dinov2_with_registers": 5}.get(family, 1)
    begin = special if placement == "after_first" else 0
    with raised(base, prompt.hidden, range(begin, begin + LENGTH)):
        expected = base(**spelled_out(family, row)).last_hidden_state
    found = backbone.states(row, prompt)
    assert (found - expected).abs().max() <= TOLERANCE[dtype]
    assert (found - backbone.states(row)).abs().max() > EFFECT


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_each_row_of_a_batch_is_itself_alone(encoder: Load, family: str, mode: str) -> None:
    backbone, inputs, prompt = encoder(family), rows(family), deep(family, mode)
    found = backbone.states(together(inputs, more=4), prompt)
    for index, row in enumerate(inputs):
        alone = backbone.states(row, prompt)[0]
        assert (found[index, : len(alone)] - alone).abs().max() <= TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_shallow_is_deep_on_one_layer(family: str, tmp_path: Path) -> None:
    folder = encoder_folder(family, tmp_path / family, num_hidden_layers=1)
    backbone, (row, *_), vectors = load_backbone(folder), rows(family), drawn(1)
    shallow = EmbeddingPrompt(embeddings=vectors[0], positions=NOWHERE, stack="encoder", placement="after_first")
    made = VisualPromptTuning(vectors, layers=1)()
    assert isinstance(made, HiddenPrompt)
    found = backbone.states(row, made)
    assert (found - backbone.states(row, shallow)).abs().max() <= TOLERANCE[torch.float32]
    assert (found - backbone.states(row)).abs().max() > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_sees_the_prompt_in_every_layer(encoder: Load, family: str) -> None:
    """The class token's state behind layer i moves with every row of layer i, and with none of a later layer."""
    backbone, (row, *_) = encoder(family), rows(family)
    hidden = tuple(each.clone().requires_grad_() for each in drawn())
    behind: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, arguments, output: behind.append(output[0, 0]))
        for layer in layers_by_name(backbone.model.base_model)
    ]
    backbone.states(row, replace(deep(family), hidden=hidden))
    for hook in hooks:
        hook.remove()
    # Folding runs the rows alone through each layer first.
    states, direction = behind[-LAYERS:], torch.randn(WIDTH, generator=torch.Generator().manual_seed(6))
    for layer, state in enumerate(states):
        seen = torch.autograd.grad(state @ direction, hidden, retain_graph=True, allow_unused=True)
        assert (seen[layer].abs().sum(dim=1) > 0).all()
        assert all(later is None or not later.any() for later in seen[layer + 1 :])


@torch.no_grad()
def test_what_the_rows_hold_does_not_depend_on_the_image(encoder: Load) -> None:
    """Which is why deep prompts fold and shallow ones do not."""
    backbone, prompt = encoder("vit"), deep("vit")
    folded = backbone.fold(prompt)
    for row in rows("vit"):
        assert (backbone.states(row, folded) - backbone.states(row, prompt)).abs().max() <= TOLERANCE[torch.float32]
    shallow = EmbeddingPrompt(embeddings=drawn(1)[0], positions=NOWHERE, stack="encoder", placement="after_first")
    assert backbone.fold(shallow) is shallow


def test_layers_that_rotate_have_no_rows_without_a_position(encoder: Load) -> None:
    backbone, (row, *_) = encoder("modernbert"), rows("modernbert")
    with pytest.raises(BackboneError, match="found layers that rotate keys by position"):
        backbone.states(row, deep("modernbert"))
