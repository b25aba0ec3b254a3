"""Prompt Tuning: the starts of the paper, its parameter counts, and slots that stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixkit.errors import ConfigError
from prefixkit.format.manifest import Positions
from prefixkit.injections import EmbeddingPrompt, Injection, KeyValuePrefix
from prefixkit.methods import prompt_initialization as initialization
from prefixkit.methods.catalogue import METHODS, TRAINED, method_file
from prefixkit.methods.method import Material
from prefixkit.methods.prompt_tuning import PromptTuning, Settings, make

VOCABULARY = 0.1 * torch.randn(6000, 8, generator=torch.Generator().manual_seed(0))
PARENT = EmbeddingPrompt(embeddings=torch.full((4, 8), 0.25), positions=Positions(text_start=4))


class Table:
    """A backbone of which only the vectors are asked."""

    kind = "decoder"
    vocabulary = VOCABULARY
    hidden_size = 8
    longest_text = None

    def key_values_of(self, token_ids: list[int]) -> KeyValuePrefix:
        raise AssertionError(token_ids)


def material(
    *, bos_id: int | None = None, labels: Sequence[Sequence[int]] = (), parent: Injection = PARENT
) -> Material:
    return Material(
        backbone=Table(),
        words=[5, 6, 7],
        tokenize=lambda text: [ord(letter) for letter in text],
        parent=lambda file: parent,
        labels=labels,
        bos_id=bos_id,
    )


def made(init: str, length: int = 4, given: Material | None = None) -> Tensor:
    return make(Settings(init=init, length=length), given or material())().embeddings


def rows_in_the_vocabulary(vectors: Tensor) -> list[int]:
    return [int((vector == VOCABULARY).all(dim=1).nonzero()[0, 0]) for vector in vectors]


def test_text_gives_its_tokens_repeated_or_cut() -> None:
    assert torch.equal(made("text"), VOCABULARY[[5, 6, 7, 5]])
    assert torch.equal(made("text:ab"), VOCABULARY[[97, 98, 97, 98]])
    assert torch.equal(made("text:abcdef"), VOCABULARY[[97, 98, 99, 100]])


def test_vocabulary_gives_common_tokens_without_repeats() -> None:
    rows = rows_in_the_vocabulary(made("vocabulary", 500))
    assert len(set(rows)) == 500
    assert max(rows) < initialization.COMMON
    assert len(rows_in_the_vocabulary(initialization.sampled(VOCABULARY[:10], 30, seed=0))) == 30


def test_labels_give_the_mean_of_their_tokens_and_the_rest_is_sampled() -> None:
    found = made("labels", 4, material(labels=[[3], [4, 9]]))
    assert torch.equal(found[:2], torch.stack([VOCABULARY[3], VOCABULARY[[4, 9]].mean(dim=0)]))
    assert max(rows_in_the_vocabulary(found[2:])) < initialization.COMMON
    with pytest.raises(ConfigError, match="--init labels: expected a task with labels; found none"):
        made("labels")


def test_uniform_is_the_papers_and_uniform_code_its_codes() -> None:
    paper, code = made("uniform", 2000), made("uniform:code", 2000)
    assert (round(paper.min().item(), 2), round(paper.max().item(), 2)) == (-0.5, 0.5)
    assert (round(code.min().item(), 2), round(code.max().item(), 2)) == (0.0, 0.5)


def test_files_give_their_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.arange(32, dtype=np.float64).reshape(4, 8))
    assert torch.equal(made(f"npy:{tmp_path / 'p.npy'}"), torch.arange(32.0).reshape(4, 8))
    assert torch.equal(made("prefix:p.safetensors"), PARENT.embeddings)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.full((4, 8), np.nan))
    for init, length, message in (
        (f"npy:{tmp_path / 'p.npy'}", 4, "numbers that are not finite"),
        (f"npy:{tmp_path / 'p.npy'}", 3, r"expected an array of shape \[3, 8\]; found \[4, 8\]"),
        (f"npy:{tmp_path / 'q.npy'}", 3, "expected a .npy file; found"),
        ("prefix:p.safetensors", 3, "expected a prefix of 3 slots; found 4; use --length 4"),
        ("prefix:", 4, "--init: expected text or text:WORDS or vocabulary"),
        ("zeros", 4, "--init: expected text"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(init, length)
    keys = KeyValuePrefix(keys=(torch.zeros(1, 4, 8),), values=(torch.zeros(1, 4, 8),), positions=PARENT.positions)
    with pytest.raises(ConfigError, match="a file that holds a EmbeddingPrompt; found a KeyValuePrefix"):
        made("prefix:p", 4, material(parent=keys))


def test_a_promised_bos_stays_what_it_is() -> None:
    method = make(Settings(length=4, unit="one"), material(bos_id=1))
    assert torch.equal(method().embeddings, VOCABULARY[[1, 5, 6, 7]])
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1, weight_decay=0.5)
    method().embeddings.pow(2).sum().backward()
    optimizer.step()
    moved = method.fold().embeddings
    assert torch.equal(moved[0], VOCABULARY[1])
    assert (moved[1:] != VOCABULARY[[5, 6, 7]]).all()


def test_a_learning_rate_counts_in_the_spread_of_the_vocabulary() -> None:
    """One step of Adam moves each number by the learning rate, in the unit that was asked for."""
    for unit, length in (("one", 0.5), ("spread", 0.5 * VOCABULARY.std().item())):
        method = make(Settings(length=3, unit=unit), material())
        assert torch.equal(method().embeddings, VOCABULARY[[5, 6, 7]])
        optimizer = torch.optim.Adam(method.parameters(), lr=0.5)
        method().embeddings.sum().backward()
        optimizer.step()
        assert torch.allclose(VOCABULARY[[5, 6, 7]] - method().embeddings, torch.full((3, 8), length), atol=1e-5)


def test_the_embedding_only_ablation_starts_exactly_and_folds() -> None:
    method = make(Settings(length=4, reparameterization="mlp", bottleneck=6), material(bos_id=1))
    assert torch.equal(method().embeddings, VOCABULARY[[1, 5, 6, 7]])
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(method().embeddings[0], VOCABULARY[1])
    assert (method().embeddings[1:] - VOCABULARY[[5, 6, 7]]).abs().max() > 0.1
    assert (method.fold().embeddings - method().embeddings).abs().max() <= 1e-6
    # Three trained vectors: an embedding each, then 8 -> 6 -> 8.
    assert sum(parameter.numel() for parameter in method.parameters()) == 3 * 8 + (8 * 6 + 6) + (6 * 8 + 8)


def test_parameter_counts_are_the_papers() -> None:
    """A hundred vectors: 51,200 numbers for T5-small, 409,600 for XXL."""
    for hidden, count in ((512, 51_200), (768, 76_800), (1024, 102_400), (2048, 204_800), (4096, 409_600)):
        assert sum(parameter.numel() for parameter in PromptTuning(torch.zeros(100, hidden)).parameters()) == count


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_is_in_the_file_of_its_name_and_starts_as_the_catalogue_says(name: str) -> None:
    settings = method_file(name).Settings()
    assert settings.name == name
    assert settings.init == METHODS[name].init[0]
    assert settings.default_lr > 0
