"""`prefixkit` as it is, but the last process runs out of memory at its third step: for `torchrun -m`."""

from __future__ import annotations

import os
from typing import Any

import torch

from prefixkit import cli

if __name__ == "__main__":
    real, steps = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *given: Any) -> Any:
        steps.append(1)
        if os.environ["RANK"] == "1" and len(steps) == 3:
            raise torch.OutOfMemoryError("no room")
        return real(self, *given)

    torch.optim.AdamW.step = step  # type: ignore[method-assign]
    cli.main()
