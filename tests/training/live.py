"""The bytes of tensors that are alive at once: what an allocator would see, without one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """In a `with` block: counts every storage that an operation makes for as long as it is there.

    Weights in oneDNN's own order have none.

    Args:
        known: tensors that were there before, which are not counted.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak, self._now = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        made = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_mkldnn:
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._sizes or place in self._known:
            return
        self._sizes[place] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self._now -= self._sizes.pop(place)
