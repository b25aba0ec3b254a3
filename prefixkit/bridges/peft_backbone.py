"""The backbone of a PEFT folder: which one it is, and whether what the folder holds fits it."""

from __future__ import annotations

from pathlib import Path

from prefixkit.bridges.peft_folder import CONFIG, Adapter
from prefixkit.errors import BackboneError, MismatchError
from prefixkit.format.manifest import BackboneIdentity, LayerGeometry


def identity(folder: Path, adapter: Adapter, backbone: str | Path | None) -> BackboneIdentity:
    """The backbone at `backbone`, or the one that the folder names, of which then nobody knows the weights.

    Raises:
        BackboneError: it cannot be used or is not here, or its sliding window would swallow the prefix.
        MismatchError: it has other layers or shapes.
    """
    from prefixkit.backbones.geometry import refuse_swallowed
    from prefixkit.backbones.identity import identify, local_folder
    from prefixkit.backbones.load import find_folder, sketch_stacks

    place = local_folder(adapter.base, adapter.revision) if backbone is None else find_folder(backbone, None)
    if place is None:
        found = f"{CONFIG} that names {adapter.base or 'none'}, which is not here"
        raise BackboneError(folder, expected="the backbone", found=found, next_step="give it with --backbone")
    source = adapter.base if backbone is None else str(backbone)
    config, stacks = sketch_stacks(place)
    decoder, encoder = stacks["decoder"], stacks.get("encoder", ())
    _refuse_other_stacks(folder, adapter, pair=bool(encoder))
    if adapter.is_prompt:
        _refuse_other_width(folder, adapter, config.hidden_size)
    else:
        _refuse_other_shapes(folder, adapter, decoder)
        refuse_swallowed(decoder, adapter.length, str(folder))
    name = place.name if Path(source).is_dir() else source
    revision = adapter.revision if backbone is None else None
    return identify(place, name, revision, config, decoder, encoder=encoder, weights=backbone is not None)


_ANOTHER = "give the backbone that the prefix was trained on"


def _refuse_other_stacks(folder: Path, adapter: Adapter, *, pair: bool) -> None:
    if adapter.pair != pair:
        expected, found = (f"a{'n encoder-' if one else ' '}decoder" for one in (adapter.pair, pair))
        raise MismatchError(folder, expected=f"{expected} as backbone", found=found, next_step=_ANOTHER)


def _refuse_other_width(folder: Path, adapter: Adapter, hidden: int) -> None:
    if adapter.width != hidden:
        expected = f"vectors of the backbone's width {hidden}"
        raise MismatchError(folder, expected=expected, found=str(adapter.width), next_step=_ANOTHER)


def _refuse_other_shapes(folder: Path, adapter: Adapter, decoder: tuple[LayerGeometry, ...]) -> None:
    found = [(adapter.kv_heads, adapter.head_dim, adapter.head_dim)] * adapter.layers
    expected = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in decoder]
    # For an encoder-decoder PEFT counts the layers of the encoder, which may have more.
    fits = found[: len(expected)] == expected if adapter.pair else found == expected
    if not fits:
        shapes = " and ".join(str(shape) for shape in sorted(set(expected)))
        raise MismatchError(
            folder,
            expected=f"the backbone's {len(expected)} layers of (kv_heads, key_dim, value_dim) {shapes}",
            found=f"{len(found)} of {found[0]}",
            next_step=_ANOTHER,
        )
