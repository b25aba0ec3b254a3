"""What is compared with ours in the same process: `generate` of transformers, and that of PEFT around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from prefixkit.bridges.peft import export_peft
from prefixkit.prefix import Prefix, key_values
from tests.bench.serving_work import Tokens, Turn, Work


class Transformers:
    """`generate` behind a `DynamicCache` that holds the prefixes, greedy.

    Prefixes are on the device already, but for the first, which is new each time as in ours. The cache is made new for
    each turn, as `generate` appends to it.
    """

    def __init__(self, work: Work, model: Any = None) -> None:
        self.work, self.model = work, model if model is not None else load_model(work)
        prefixes = work.prefixes
        self.first = tensors_of(prefixes[0], work)
        rows = [tensors_of(prefix, work) for prefix in prefixes]
        self.stacked = [torch.stack(each).to(work.device) for each in zip(*rows, strict=True)]

    def write(self, prompts: Sequence[Tokens] | None = None, *, behind: bool = True) -> Turn:
        """Every row once; without `behind` there is no prefix."""
        ids, began = torch.tensor(prompts or self.work.prompts(), device=self.work.device), time.perf_counter()
        if not behind:
            return generated(self.model, ids, self.work.new, began)
        for row, tensor in zip(self.stacked, self.first, strict=True):
            row[0].copy_(tensor)
        # `generate` drops as many ids as the cache has slots.
        shown = torch.cat([ids.new_zeros(len(ids), self.work.length), ids], dim=1)
        return generated(self.model, shown, self.work.new, began, past_key_values=self.cache())

    def cache(self) -> DynamicCache:
        """All prefixes."""
        made = DynamicCache()
        for layer in range(len(self.stacked) // 2):
            made.update(self.stacked[2 * layer], self.stacked[2 * layer + 1], layer)
        return made


class Peft:
    """`generate` of a `PeftModel` with the prefix of the first row for all: it knows one. That one is new each time."""

    def __init__(self, work: Work, model: Any = None) -> None:
        self.work = work
        prefix = work.prefixes[0]
        with TemporaryDirectory() as folder:
            export_peft(prefix, Path(folder) / "prefix")
            self.model = PeftModel.from_pretrained(
                model if model is not None else load_model(work), str(Path(folder) / "prefix")
            ).eval()
        (self.trained,) = self.model.prompt_encoder["default"].parameters()
        self.new = self.trained.detach().cpu().clone()

    def write(self, prompts: Sequence[Tokens] | None = None) -> Turn:
        """Every row once."""
        ids, began = torch.tensor(prompts or self.work.prompts(), device=self.work.device), time.perf_counter()
        self.trained.data.copy_(self.new)
        return generated(self.model, ids, self.work.new, began)


class _FirstToken:
    """A stopping criterion that stops nothing: `generate` asks it behind every token."""

    def __init__(self, device: str) -> None:
        self.device, self.at = device, 0.0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.at:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.at = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@torch.inference_mode()
def generated(model: Any, ids: Tensor, new: int, began: float, **past: Any) -> Turn:
    """What `model` writes behind `ids` [batch, seq]."""
    clock, mask = _FirstToken(ids.device.type), torch.ones_like(ids)
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, stopping_criteria=[clock], **past
    )
    tokens = found[:, ids.shape[1] :].tolist()  # waits for the device
    return Turn(clock.at - began, time.perf_counter() - began, tokens)


def load_model(work: Work) -> Any:
    """The backbone as transformers loads it, with nothing that ends a text."""
    model = AutoModelForCausalLM.from_pretrained(work.backbone, dtype=getattr(torch, work.dtype))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.to(work.device).eval().requires_grad_(False)


def tensors_of(prefix: Prefix, work: Work) -> list[Tensor]:
    """Key and value of each layer [kv_heads, length, head_dim], on the CPU, in the dtype of the model."""
    # numpy's bfloat16 is unknown to PyTorch.
    arrays = [torch.from_numpy(each.astype(np.float32)) for pair in key_values(prefix) for each in pair]
    return [each.to(getattr(torch, work.dtype)) for each in arrays]
