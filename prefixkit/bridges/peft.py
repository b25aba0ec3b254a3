"""PEFT's prefixes, cartridges and prompts, there and back, bit for bit; PEFT itself is not needed.

A PEFT folder names its backbone and states nothing more. Given a backbone, an import checks the shapes against it and
binds the prefix to its weights; without one it reads the configuration of the model that the folder names, and the file
says that its weights are unknown.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prefixkit import __version__
from prefixkit.bridges.carried import Carried
from prefixkit.bridges.described import (
    Described,
    described,
    refuse_other_kind,
    refuse_other_shapes,
    refuse_other_width,
    refuse_too_long,
)
from prefixkit.bridges.imported import key_value_record, prompt_record, refuse_not_finite
from prefixkit.bridges.peft_expressible import expressible
from prefixkit.bridges.peft_folder import Adapter, read_adapter, write_adapter
from prefixkit.bridges.peft_layout import left_behind, packed, stored_layers, tensors_of
from prefixkit.format import names
from prefixkit.format.manifest import Manifest, Provenance
from prefixkit.prefix import Prefix, key_values


def import_peft(source: str | Path, *, backbone: str | Path | None = None) -> Prefix:
    """The prefix or the prompt in a folder that PEFT saved.

    Of an encoder-decoder PEFT reads only a part of what it stores: `lost` in the provenance's config names the rest.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors.
        backbone: folder or hub id of the model that it was trained on. Without it the weights stay unknown
            (`weights_hash` None), and later checks compare the configuration only.

    Raises:
        FormatError: no such folder or damaged files, another adapter, NaN or Infinity.
        BackboneError: the backbone cannot be used, or none is given and the one that the folder names is not here.
        MismatchError: the prefix has other layers or shapes than the backbone, or leaves no position for text.
    """
    folder = Path(source)
    adapter, tensor = read_adapter(folder)
    known = described(folder, backbone=backbone, named=adapter.base, revision=adapter.revision)
    _refuse_unfit(folder, adapter, known)
    layers = len(known.decoder)
    tensors, lost = tensors_of(adapter, tensor, layers), left_behind(adapter, layers)
    refuse_not_finite(folder, tensors)
    provenance = Provenance(
        method=adapter.kind.lower().replace("_", "-"),
        prefixkit=__version__,
        config={"imported_from": "peft"} | ({"lost": list(lost)} if lost else {}),
    )
    length, pair = adapter.length, adapter.pair
    record = prompt_record(length, pair=pair) if adapter.is_prompt else key_value_record(length, frozen=adapter.frozen)
    return Prefix(Manifest(backbone=known.identity(), injections=(record,), provenance=provenance), tensors)


def export_peft(prefix: Prefix, output: str | Path) -> Carried:
    """Write `prefix` as a folder that `PeftModel.from_pretrained` loads; the usage contract has no place in it.

    A prompt becomes PROMPT_TUNING, whatever made it: P_TUNING is the same vectors.

    Raises:
        FormatError: what PEFT cannot express: something besides a prompt or a decoder's keys and values, slots of the
            text, layers of different shapes, text that does not start right after the prefix.
        InputError: the folder cannot be written, or holds other files. Nothing half-written stays.
    """
    record = expressible(prefix)
    if record.kind == "embedding_prompt":
        vectors = prefix.tensors[names.PROMPT]
        write_adapter(output, _adapter(prefix, "PROMPT_TUNING", *vectors.shape), vectors)
    else:
        pairs = key_values(prefix)
        adapter = _of_keys_and_values(prefix, record.frozen_slots or 0, len(pairs), pairs[0][0].shape)
        write_adapter(output, adapter, packed(adapter, pairs))
    return Carried(output=Path(output), next=f'PeftModel.from_pretrained(model, "{output}")')


def _refuse_unfit(folder: Path, adapter: Adapter, known: Described) -> None:
    from prefixkit.backbones.geometry import refuse_swallowed

    refuse_other_kind(folder, known, pair=adapter.pair)
    if adapter.is_prompt:
        refuse_other_width(folder, adapter.width, known)
    else:
        shape = adapter.kv_heads, adapter.head_dim, adapter.head_dim
        refuse_other_shapes(folder, [shape] * adapter.layers, known)
        refuse_swallowed(known.decoder, adapter.length, str(folder))
    refuse_too_long(folder, adapter.length, known)


def _adapter(prefix: Prefix, kind: str, length: int, width: int) -> Adapter:
    backbone = prefix.manifest.backbone
    pair = "encoder" in backbone.stacks
    return Adapter(kind=kind, length=length, width=width, pair=pair, base=backbone.name, revision=backbone.revision)


def _of_keys_and_values(prefix: Prefix, frozen: int, layers: int, shape: tuple[int, ...]) -> Adapter:
    heads, length, dim = shape
    adapter = _adapter(prefix, "CARTRIDGE" if frozen else "PREFIX_TUNING", length, heads * dim)
    stored = stored_layers(adapter.pair, layers)
    return replace(adapter, layers=stored, kv_heads=heads, frozen=frozen, stacks=1 + adapter.pair)
