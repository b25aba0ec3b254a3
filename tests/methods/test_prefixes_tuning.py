"""Prefix-Tuning on encoder-decoders: three prefixes that share nothing, exact starts, gradients, counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.errors import ConfigError
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes
from prefixkit.methods.method import Material
from prefixkit.methods.prefix_tuning import PLACES, PrefixesTuning, Settings, make
from tests.encoder_decoders import CONFIGS, END, random_prefixes, tiny, to_double, wrap

SOURCE, LABELS = torch.tensor([[40, 41, 42, END]]), torch.tensor([[50, 51, END]])


def made(backbone: EncoderDecoder, **settings: object) -> PrefixesTuning:
    material = Material(
        backbone=backbone,
        words=list(range(30, 60)),
        tokenize=lambda text: [ord(letter) for letter in text],
        parent=lambda file: random_prefixes(backbone, 4, (("decoder", "self"),)),
    )
    method = make(Settings(length=4, **settings).on("encoder-decoder"), material)  # type: ignore[arg-type]
    assert isinstance(method, PrefixesTuning)
    return method


def parts(prefixes: KeyValuePrefixes) -> dict[str, KeyValuePrefix]:
    return {part.place: part for part in prefixes.parts}


def tensors(prefixes: KeyValuePrefixes) -> list[Tensor]:
    return [tensor for part in prefixes.parts for tensor in (*part.keys, *part.values)]


def loss(backbone: EncoderDecoder, method: PrefixesTuning) -> Tensor:
    logits = backbone.target_logits(SOURCE, torch.ones_like(SOURCE), LABELS, method())
    return torch.nn.functional.cross_entropy(logits, LABELS[0])


@pytest.mark.parametrize("init", ["text", "random"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_slot_of_all_three_learns(family: str, init: str) -> None:
    backbone = wrap(tiny(family))
    method = made(backbone, init=init)
    assert [part.place for part in method().parts] == list(PLACES)
    prefixes = method()
    for tensor in tensors(prefixes):
        tensor.retain_grad()
    logits = backbone.target_logits(SOURCE, torch.ones_like(SOURCE), LABELS, prefixes)
    torch.nn.functional.cross_entropy(logits, LABELS[0]).backward()
    for tensor in tensors(prefixes):
        assert tensor.grad is not None
        assert (tensor.grad.abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_gradients_equal_finite_differences(family: str) -> None:
    backbone = wrap(to_double(tiny(family)))
    method = made(backbone, init="text").double()
    loss(backbone, method).backward()
    for parameter in method.parameters():
        assert parameter.grad is not None
        for index in [(0, 0), (1, 70), (3, 200)]:
            with torch.no_grad():
                parameter[index] += 1e-5
                above = loss(backbone, method)
                parameter[index] -= 2e-5
                below = loss(backbone, method)
                parameter[index] += 1e-5
            assert parameter.grad[index].item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-5, abs=1e-9)


def test_parameter_counts_are_three_prefixes() -> None:
    """As BART-large with 100 slots: 3 · P · L · 2 · d, and an MLP for each."""
    backbone = wrap(tiny("bart"))
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert count(made(backbone)) == 3 * 4 * 2 * 2 * 64
    trained = made(backbone, reparameterization="mlp", bottleneck=8)
    assert count(trained) == 3 * (4 * 64 + (64 * 8 + 8) + (8 * 2 * 2 * 64 + 2 * 2 * 64))
    assert count(made(backbone, stacks="encoder.self,decoder.cross")) == 2 * 4 * 2 * 2 * 64


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_training_begins_at_the_keys_and_values_of_the_text(reparameterization: str) -> None:
    backbone = wrap(tiny("t5_uneven"))
    begin = backbone.key_values_of([30, 31, 32, 33])
    method = made(backbone, reparameterization=reparameterization)
    assert all(map(torch.equal, tensors(method()), tensors(begin)))
    assert all(map(torch.equal, tensors(method.fold()), tensors(begin)))
    own = made(backbone, init="text:ab")
    assert all(map(torch.equal, tensors(own()), tensors(backbone.key_values_of([97, 98, 97, 98]))))


def test_an_mlp_moves_its_own_prefix_alone() -> None:
    method = made(wrap(tiny("bart")), reparameterization="mlp", bottleneck=8)
    before = parts(method.fold())
    with torch.no_grad():
        method.parts[0].prefix.up.bias += 1.0
    moved = {
        place for place, part in parts(method.fold()).items() if not torch.equal(part.keys[0], before[place].keys[0])
    }
    assert moved == {PLACES[0]}


def test_random_starts_have_the_models_own_scale_and_zeros_are_zero() -> None:
    backbone = wrap(tiny("bart"))
    words = list(range(30, 60))
    real, drawn = parts(backbone.key_values_of(words)), parts(made(backbone, init="random")())
    for place in PLACES:
        found, expected = torch.stack(drawn[place].values), torch.stack(real[place].values)
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.25)
        assert drawn[place].positions == real[place].positions
    assert all(tensor.abs().max() == 0 for tensor in tensors(made(backbone, init="zeros")()))


def test_a_file_is_a_start_for_the_places_that_it_has() -> None:
    backbone = wrap(tiny("bart"))
    begin = random_prefixes(backbone, 4, (("decoder", "self"),))
    assert all(map(torch.equal, tensors(made(backbone, init="prefix:p", stacks="decoder.self")()), tensors(begin)))
    with pytest.raises(
        ConfigError, match=r"--init: expected a file with a prefix for encoder\.self; found decoder\.self"
    ):
        made(backbone, init="prefix:p")


def test_settings_mean_what_the_backbone_lets_them_mean() -> None:
    settings = Settings()
    assert settings.on("decoder") == replace(settings, positions="offset")
    resolved = settings.on("encoder-decoder")
    assert (resolved.positions, resolved.stacks) == ("none", "decoder.self,encoder.self,decoder.cross")
    with pytest.raises(ConfigError, match="positions: expected none, as on every encoder-decoder; found offset"):
        Settings(positions="offset").on("encoder-decoder")
    with pytest.raises(ConfigError, match="stacks: expected an encoder-decoder to choose them on; found a decoder"):
        Settings(stacks="decoder.self").on("decoder")
    with pytest.raises(ConfigError, match=r"found 'encoder\.cross'"):
        Settings(stacks="decoder.self,encoder.cross")
