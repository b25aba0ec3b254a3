"""A backbone that fits on no GPU, spread over several: each holds a part of every layer, and all of it while it works.

Through FSDP2 (`torch.distributed.fsdp.fully_shard`). Embeddings and output layer stay whole: they are used outside the
layers, too, and losses are computed part by part from the latter.
"""

from __future__ import annotations

import warnings

from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.geometry import reader_of
from prefixkit.backbones.hidden import layers_of
from prefixkit.errors import ConfigError


def shard(backbone: Backbone, device: str) -> None:
    """Spread the layers of `backbone`, which is on the CPU, over all processes, and put the rest on `device`.

    A layer goes to the device as a whole, is spread, and makes room for the next one.

    Raises:
        ConfigError: no decoder.
    """
    if backbone.kind != "decoder":
        raise ConfigError("shard", expected="a decoder, to spread its layers", found=f"an {backbone.kind}")
    model, layers = backbone.model, layers_of(backbone.model)
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    apart = {id(weight) for weight in layers.parameters()}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None and id(weight) not in apart:
                weight.data = weight.data.to(device)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # The decoder takes the lead, so that the next layer is under way while one works; its own weights stay whole.
    own = {weight for weight in model.parameters() if id(weight) not in apart}
    fully_shard(reader_of(model), mesh=mesh, ignored_params=own)
    for module in (reader_of(model), *layers):
        _as_before(type(module))
    # It fears for what is changed in place; states are not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def _as_before(kind: type[nn.Module]) -> None:
    # FSDP2 makes subclasses; by the module of a class we know how its attention works.
    kind.__module__ = kind.__mro__[2].__module__
