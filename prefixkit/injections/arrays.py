"""Tensors as the arrays of a prefix file, and back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from prefixkit.prefix import Array


def array(tensor: Tensor) -> Array:
    """The numbers of `tensor`, in its dtype; torch and numpy share no bfloat16: its bits travel as integers."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()


def tensor(stored: Array) -> Tensor:
    """The numbers of `stored`, copied: the arrays of a loaded file are read-only, which torch does not know."""
    if stored.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(stored.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(stored.copy())
