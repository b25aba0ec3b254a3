"""How fast decoding could be: all weights and all keys and values read once, as fast as the device copies memory."""

from __future__ import annotations

import time

import torch
from safetensors import safe_open

from prefixkit.format.digest import weight_files
from tests.bench.serving_work import Work

ROOF = "the roof: weights and keys and values at the rate of a copy"
_MIB = {"cuda": 2048, "cpu": 256}
"""Of a copy: more than any cache holds."""
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
_TABLES = ("embed_tokens.weight", "wte.weight", "wpe.weight")


class Roof:
    """The bytes of a token of every row, over a bandwidth that is measured in turns with the contenders."""

    def __init__(self, work: Work) -> None:
        self.bytes = weight_bytes(work) + key_value_bytes(work)
        size = _MIB[work.device] * 2**20
        self.source = torch.ones(size // 4, device=work.device)
        self.target = torch.empty_like(self.source)

    def per_token(self, _: int) -> float:
        """Milliseconds, measured anew each turn."""
        return 1000 * self.bytes / self.bandwidth()

    def bandwidth(self) -> float:
        """Bytes read and written a second, the best of five copies."""
        return 2 * self.source.nbytes / min(self._seconds() for _ in range(5))

    def _seconds(self) -> float:
        self._wait()
        began = time.perf_counter()
        self.target.copy_(self.source)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.source.is_cuda:
            torch.cuda.synchronize()


def weight_bytes(work: Work) -> int:
    """What a pass reads of the weights: not the tables of embeddings, unless one is the output layer as well."""
    sizes: dict[str, int] = {}
    for file in weight_files(work.backbone):
        with safe_open(file, "pt") as stored:
            sizes |= {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            sizes = {name: _numbers(one) if not isinstance(one, int) else one for name, one in sizes.items()}
    tied = "lm_head.weight" not in sizes
    read = [size for name, size in sizes.items() if not name.endswith(_TABLES) or (tied and "wpe" not in name)]
    return sum(read) * _ITEM[work.dtype]


def key_value_bytes(work: Work) -> int:
    """What a pass in the middle of the answer reads of the cache."""
    layers = work.identity.stacks["decoder"]
    slot = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    return work.rows * (work.length + work.prompt + work.new // 2) * slot * _ITEM[work.dtype]


def _numbers(stored: object) -> int:
    return int(torch.Size(stored.get_shape()).numel())  # type: ignore[attr-defined]
