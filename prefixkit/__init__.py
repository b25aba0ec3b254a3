"""prefixkit: train prefixes against frozen models, keep each in one portable file, serve them anywhere.

Everything is imported on first use: `import prefixkit` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixkit.backbones.attach import attach as attach
    from prefixkit.backbones.attach import detach as detach
    from prefixkit.backbones.load import load_backbone as load_backbone
    from prefixkit.backbones.snapshot import snapshot as snapshot
    from prefixkit.export.onnx import export_onnx as export_onnx
    from prefixkit.methods.prefix_tuning import PrefixTuning as PrefixTuning
    from prefixkit.methods.prompt_tuning import PromptTuning as PromptTuning
    from prefixkit.prefix import Prefix as Prefix
    from prefixkit.prefix import load as load
    from prefixkit.prefix import save as save
    from prefixkit.serving.engine import Engine as Engine
    from prefixkit.serving.request import Request as Request
    from prefixkit.serving.sampling import Sampling as Sampling
    from prefixkit.serving.session import Session as Session
    from prefixkit.training.capture import capture as capture
    from prefixkit.training.config import TrainConfig as TrainConfig
    from prefixkit.training.loop import train as train

__version__ = "0.1.0"

_HOME = {
    "Prefix": "prefixkit.prefix",
    "load": "prefixkit.prefix",
    "save": "prefixkit.prefix",
    "Engine": "prefixkit.serving.engine",
    "Request": "prefixkit.serving.request",
    "Sampling": "prefixkit.serving.sampling",
    "Session": "prefixkit.serving.session",
    "attach": "prefixkit.backbones.attach",
    "detach": "prefixkit.backbones.attach",
    "load_backbone": "prefixkit.backbones.load",
    "PrefixTuning": "prefixkit.methods.prefix_tuning",
    "PromptTuning": "prefixkit.methods.prompt_tuning",
    "TrainConfig": "prefixkit.training.config",
    "train": "prefixkit.training.loop",
    "capture": "prefixkit.training.capture",
    "export_onnx": "prefixkit.export.onnx",
    "snapshot": "prefixkit.backbones.snapshot",
}

__all__ = [
    "Engine",
    "Prefix",
    "PrefixTuning",
    "PromptTuning",
    "Request",
    "Sampling",
    "Session",
    "TrainConfig",
    "attach",
    "capture",
    "detach",
    "export_onnx",
    "load",
    "load_backbone",
    "save",
    "snapshot",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prefixkit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
