"""A backbone in half precision: what is trained, its gradients and the optimizer's state stay in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.prefix import save
from prefixkit.training import loop
from prefixkit.training.checkpoint import State
from prefixkit.training.progress import Silence
from tests.training.every_kind import PAIRS, prepared


class Gradients(Silence):
    """Looks at the gradients of a method before the optimizer does."""

    def __init__(self, method: torch.nn.Module) -> None:
        self.dtypes: set[torch.dtype] = set()
        for weight in method.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self.look)

    def look(self, weight: Any) -> None:
        self.dtypes.add(weight.grad.dtype)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_only_the_backbone_is_in_bfloat16(method: str, family: str, tmp_path: Path) -> None:
    run = prepared(method, family, tmp_path, dtype="bfloat16", steps=2)
    gradients, optimizer, state = Gradients(run.method), loop.make_optimizer(run), State()
    loop.run(run, optimizer, state, gradients)
    assert {weight.dtype for weight in run.backbone.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in run.method.parameters()} == {torch.float32}
    assert gradients.dtypes == {torch.float32}
    kept = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, torch.Tensor)]
    assert all(value.dtype == torch.float32 for value in kept)
    assert kept or method == "autoprompt"
    written = save(loop.result(run, state), tmp_path / "made.safetensors")
    assert {str(tensor.dtype) for tensor in written.tensors.values()} <= {"float32"}
