"""What differs between the exports of decoders, of encoder-decoders and of models that read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from prefixkit.backbones.backbone import Backbone
from prefixkit.export.parity import CaseResult
from prefixkit.export.weights import Weights, save_graph
from prefixkit.injections import Injection
from prefixkit.prefix import Prefix


class Export(ABC):
    """One export, which goes through these methods in order.

    Attributes:
        prefix: the file that is exported, folded once `load` is done; None for a bare backbone.
        baked: whether what it injects is inside the graph.
        received: what it injects, once `load` is done.
    """

    def __init__(self, prefix: Prefix | None, *, dtype: str, baked: bool) -> None:
        """Raises InputError, before any work, for what cannot be exported."""
        self.prefix, self.dtype, self.baked = prefix, dtype, baked
        self.received: Injection | None = None

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """What is exported, once `load` is done."""

    @abstractmethod
    def load(self, backbone: Backbone | str | Path, allow_mismatch: bool) -> None:
        """Load the backbone and fold the prefix. Raises InputError where one cannot have the other."""

    @abstractmethod
    def graphs(self) -> Mapping[str, ir.Model]:
        """The graphs of the folder, by file."""

    @property
    def usual_weights(self) -> Weights:
        """Where weights are stored where nobody says."""
        return "external"

    def save(self, graphs: Mapping[str, ir.Model], folder: Path, weights: Weights) -> None:
        """Write `graphs` below `folder`."""
        for file, graph in graphs.items():
            save_graph(graph, folder / file, weights, self.backbone.folder)

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What `export.json` says of graphs of this kind alone."""

    def twin(self, folder: Path) -> Export | None:
        """What is verified in the place of `folder`, whose graphs do not run here; None where they do."""
        return None

    @abstractmethod
    def verify(self, folder: Path) -> tuple[CaseResult, ...]:
        """Compare the folder with PyTorch."""
