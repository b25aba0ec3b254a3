"""Tiny encoders as `load_backbone` loads them, and the same folders as `transformers` loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.load import load_backbone
from tests.encoders import TEXT, encoder_folder


@pytest.fixture(scope="session")
def encoder_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`encoder_at("bert")`: the folder of that family, the same one each time."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = encoder_folder(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def encoder(encoder_at: Callable[[str], Path]) -> Callable[..., Encoder]:
    """`encoder("bert")`: our backbone, the same one each time, in float32 or the dtype that is asked for."""
    made: dict[tuple[str, torch.dtype], Encoder] = {}

    def load(family: str, dtype: torch.dtype = torch.float32) -> Encoder:
        if (family, dtype) not in made:
            backbone = load_backbone(encoder_at(family))
            assert isinstance(backbone, Encoder)
            backbone.model.to(dtype)
            made[family, dtype] = backbone
        return made[family, dtype]

    return load


@pytest.fixture(scope="session")
def plain(encoder_at: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """`plain("bert")`: a model that this project never touched, with a masked language model's head where it reads."""
    made: dict[tuple[str, torch.dtype], PreTrainedModel] = {}

    def load(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        if (family, dtype) not in made:
            kind = AutoModelForMaskedLM if family in TEXT else AutoModel
            model = kind.from_pretrained(encoder_at(family), attn_implementation="sdpa")
            made[family, dtype] = model.eval().requires_grad_(False).to(dtype)
        return made[family, dtype]

    return load
