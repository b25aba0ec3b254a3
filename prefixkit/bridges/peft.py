"""PEFT's prefix tuning and cartridges on decoders, there and back, bit for bit; PEFT itself is not needed.

A PEFT folder names its backbone and states nothing more. Given a backbone, an import checks the shapes against it and
binds the prefix to its weights; without one it reads the configuration of the model that the folder names, and the file
says that its weights are unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prefixkit import __version__
from prefixkit.bridges.carried import Carried
from prefixkit.bridges.peft_folder import CONFIG, Adapter, read_adapter, write_adapter
from prefixkit.errors import BackboneError, FormatError, MismatchError
from prefixkit.format import names
from prefixkit.format.manifest import BackboneIdentity, InjectionRecord, LayerGeometry, Manifest, Positions, Provenance
from prefixkit.prefix import Array, Prefix, key_values


def import_peft(folder: str | Path, *, backbone: str | Path | None = None) -> Prefix:
    """The prefix in a folder that PEFT saved.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        backbone: folder or hub id of the model that it was trained on. Without it the weights stay unknown
            (`weights_hash` None), and later checks compare the configuration only.

    Raises:
        FormatError: no such folder or damaged files, an encoder-decoder's prefix, a soft prompt, another adapter.
        BackboneError: the backbone cannot be used, or none is given and the one that the folder names is not here.
        MismatchError: the prefix has other layers or shapes than the backbone.
    """
    adapter, tensor = read_adapter(Path(folder))
    identity = _identity(Path(folder), adapter, backbone)
    record = InjectionRecord(
        kind="key_value_prefix",
        stack="decoder",
        attention="self",
        length=adapter.length,
        positions=Positions(text_start=adapter.length),
        frozen_slots=adapter.frozen,
    )
    method = adapter.kind.lower().replace("_", "-")
    provenance = Provenance(method=method, prefixkit=__version__, config={"imported_from": "peft"})
    return Prefix(Manifest(backbone=identity, injections=(record,), provenance=provenance), _unpack(tensor))


def export_peft(prefix: Prefix, folder: str | Path) -> Carried:
    """Write `prefix` as a folder that `PeftModel.from_pretrained` loads; the usage contract has no place in it.

    Raises:
        FormatError: what PEFT cannot express: something besides keys and values, slots of the text, layers of different
            shapes, text that does not start right after the prefix.
        InputError: the folder cannot be written, or holds other files. Nothing half-written stays.
    """
    record, backbone = _expressible(prefix), prefix.manifest.backbone
    # [layers, 2, kv_heads, prefix, head_dim]
    tensor = np.stack([np.stack(pair) for pair in key_values(prefix)])
    layers, _, heads, length, dim = tensor.shape
    adapter = Adapter(
        kind="CARTRIDGE" if record.frozen_slots else "PREFIX_TUNING",
        length=length,
        layers=layers,
        kv_heads=heads,
        head_dim=dim,
        frozen=record.frozen_slots or 0,
        base=backbone.name,
        revision=backbone.revision,
    )
    write_adapter(folder, adapter, tensor.transpose(3, 0, 1, 2, 4))
    return Carried(output=Path(folder), next=f'PeftModel.from_pretrained(model, "{folder}")')


def _unpack(tensor: Array) -> dict[str, Array]:
    tensors = {}
    for layer, (key, value) in enumerate(tensor.transpose(1, 2, 3, 0, 4)):
        tensors[names.key("decoder", "self", layer)] = np.ascontiguousarray(key)
        tensors[names.value("decoder", "self", layer)] = np.ascontiguousarray(value)
    return tensors


def _identity(folder: Path, adapter: Adapter, backbone: str | Path | None) -> BackboneIdentity:
    from prefixkit.backbones.geometry import refuse_swallowed
    from prefixkit.backbones.identity import identify, local_folder
    from prefixkit.backbones.load import find_folder, sketch

    place = local_folder(adapter.base, adapter.revision) if backbone is None else find_folder(backbone, None)
    if place is None:
        found = f"{CONFIG} that names {adapter.base or 'none'}, which is not here"
        raise BackboneError(folder, expected="the backbone", found=found, next_step="give it with --backbone")
    source = adapter.base if backbone is None else str(backbone)
    config, geometry = sketch(place)
    _refuse_other_shapes(folder, adapter, geometry)
    refuse_swallowed(geometry, adapter.length, str(folder))
    name = place.name if Path(source).is_dir() else source
    revision = adapter.revision if backbone is None else None
    return identify(place, name, revision, config, geometry, weights=backbone is not None)


def _refuse_other_shapes(folder: Path, adapter: Adapter, geometry: tuple[LayerGeometry, ...]) -> None:
    found = [(adapter.kv_heads, adapter.head_dim, adapter.head_dim)] * adapter.layers
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in geometry]
    if found != expected:
        shapes = " and ".join(str(shape) for shape in sorted(set(expected)))
        raise MismatchError(
            folder,
            expected=f"the backbone's {len(expected)} layers of (kv_heads, key_dim, value_dim) {shapes}",
            found=f"{len(found)} of {found[0]}",
            next_step="give the backbone that the prefix was trained on",
        )


def _expressible(prefix: Prefix) -> InjectionRecord:
    """The one injection of `prefix`, if PEFT can say it."""
    records = prefix.manifest.injections
    expected, found = "what PEFT can express: ", ""
    if "encoder" in prefix.manifest.backbone.stacks:
        expected += "keys and values of a decoder alone"
        found = f"a prefix for an encoder{'-decoder' if 'decoder' in prefix.manifest.backbone.stacks else ''}"
    elif len(records) != 1 or (records[0].kind, records[0].stack) != ("key_value_prefix", "decoder"):
        expected += "keys and values of a decoder alone"
        found = ", ".join(record.kind for record in records)
    elif records[0].infix:
        expected += "keys and values before the text"
        found = "some in slots of it"
    elif records[0].positions != Positions(text_start=records[0].length or 0):
        expected += f"text that starts at position {records[0].length}, after the prefix"
        found = str(records[0].positions)
    elif len({array.shape for array in prefix.tensors.values()}) > 1:
        expected += "the same shape for all keys and values"
        found = " and ".join(sorted({str(array.shape) for array in prefix.tensors.values()}))
    elif len({array.dtype for array in prefix.tensors.values()}) > 1:
        expected += "one dtype for all keys and values"
        found = " and ".join(sorted({str(array.dtype) for array in prefix.tensors.values()}))
    if found:
        raise FormatError("prefix", expected=expected, found=found)
    return records[0]
