"""The file of a cartridge: what `torch.save` makes of lists of parameters, read without running anything in it.

A pickle may name any function of any module and call it. Here PyTorch's own restricted reader is allowed tensors and
`ParameterList`, and everything else in the file is an error.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.errors import FormatError
from prefixkit.format.atomic import replacing
from prefixkit.prefix import Array

if TYPE_CHECKING:
    from torch import Tensor

Lists = dict[str, list[Array]]
"""By name (`frozen_keys`, `trainable_values`, …), one array [kv_heads, slots, head_dim] a layer."""
_NAMES = ("frozen_keys", "frozen_values", "trainable_keys", "trainable_values")
_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")
_AGAIN = "TrainableCache.save writes it"


def write_lists(path: Path, lists: Lists) -> None:
    """Write `lists`, frozen ones under both of their names. Raises InputError where the file cannot be written."""
    import torch
    from torch import nn

    from prefixkit.injections.arrays import tensor

    made = {}
    for name in _NAMES:
        trains = name.startswith("trainable")
        rows = [tensor(array).contiguous()[None] for array in lists[name]]
        made[name] = nn.ParameterList([nn.Parameter(row, requires_grad=trains) for row in rows])
    older = {name.replace("frozen", "fixed"): made[name] for name in _NAMES if name.startswith("frozen")}
    with replacing(path) as file:
        torch.save({**made, **older}, file)


def read_lists(path: Path) -> Lists:
    """The lists of a cartridge, without the batch axis; `fixed_*` counts as `frozen_*`.

    Raises:
        FormatError: no such file, no such contents, or code in the place of numbers.
    """
    stored = _unpickled(path)
    size = path.stat().st_size
    lists = {name: _list(path, stored, name, size) for name in _NAMES}
    _refuse_unlike(path, lists)
    return lists


def _unpickled(path: Path) -> Mapping[str, Any]:
    import torch
    from torch import nn

    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FormatError(path, expected="the .pt file of a cartridge", found=found, next_step="check the path")
    _refuse_other_archives(path)
    try:
        # An open file: of a path torch takes the ending for the format.
        with torch.serialization.safe_globals([nn.ParameterList]), path.open("rb") as file:
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives and forbidden names come as errors of many types
        found = _forbidden(path) or f"a file that cannot be read ({type(error).__name__})"
        step = "if you trust its maker, load it there and save the four lists alone"
        raise FormatError(path, expected="lists of tensors and nothing else", found=found, next_step=step) from error
    if not isinstance(stored, Mapping):
        raise FormatError(path, expected="a dict of a cartridge's lists", found=f"a {type(stored).__name__}")
    return stored


def _refuse_other_archives(path: Path) -> None:
    """Only what `torch.save` writes: uncompressed, so that a file is as large as what is in it."""
    expected = "a zip archive without compression, as torch.save writes it"
    if not zipfile.is_zipfile(path):
        raise FormatError(path, expected=expected, found="another file")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise FormatError(path, expected=expected, found="a damaged one") from error
    if packed:
        raise FormatError(path, expected=expected, found="a compressed one")


def _forbidden(path: Path) -> str:
    """The names that the file wants to call, if they can be listed."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # whatever the file is, it was refused already
        return ""
    others = [name for name in names if not name.endswith(".ParameterList")]
    return f"a call of {', '.join(others)[:120]}" if others else ""


def _list(path: Path, stored: Mapping[str, Any], name: str, size: int) -> list[Array]:
    from prefixkit.injections.arrays import array

    older = name.replace("frozen", "fixed")
    value = stored.get(name, stored.get(older))
    if value is None:
        found = ", ".join(sorted(map(str, stored)))[:120] or "nothing"
        raise FormatError(path, expected=f"{name}{f' or {older}' if older != name else ''}", found=found)
    tensors = _plain_tensors(path, value, name)
    for one in tensors:
        dtype, shape = str(one.dtype), tuple(one.shape)
        # Strides of 0 would make a tensor of any size out of one number.
        taken = one.numel() * one.element_size()
        if dtype not in _DTYPES or len(shape) != 4 or shape[0] != 1 or taken > size:
            expected = f"{name} of [1, kv_heads, slots, head_dim] in float32, float16 or bfloat16"
            found = f"{list(shape)} in {dtype.removeprefix('torch.')}"
            raise FormatError(path, expected=expected, found=found, next_step=_AGAIN)
    return [array(one)[0] for one in tensors]


def _plain_tensors(path: Path, value: Any, name: str) -> list[Tensor]:
    """The tensors of a list whose numbers lie in memory, one behind the other; others cannot even be measured."""
    import torch
    from torch import nn

    expected = f"{name}, a list of tensors"
    try:
        # A tensor is iterable too, and may claim any number of rows.
        tensors: list[Any] = list(value) if isinstance(value, (list, tuple, nn.ParameterList)) else [None]
        plain = [
            one.layout == torch.strided and one.device.type == "cpu" and not one.is_nested and not one.is_neg()
            for one in tensors
        ]
    except Exception as error:  # a ParameterList is made of whatever the file says
        found = f"a {type(value).__name__}"
        raise FormatError(path, expected=expected, found=found, next_step=_AGAIN) from error
    if not all(plain):
        found = "one that is sparse, nested or without numbers"
        raise FormatError(path, expected=expected, found=found, next_step=_AGAIN)
    return tensors


def _refuse_unlike(path: Path, lists: Lists) -> None:
    """Refuse lists that are no layers of one model."""
    if not lists["frozen_keys"] and not lists["frozen_values"]:
        # Nothing frozen may be no list at all.
        lists.update(
            {f"frozen_{kind}": [one[:, :0] for one in lists[f"trainable_{kind}"]] for kind in ("keys", "values")}
        )
    counts = {len(arrays) for arrays in lists.values()}
    if len(counts) > 1 or 0 in counts:
        told = ", ".join(f"{len(arrays)} {name}" for name, arrays in lists.items())
        raise FormatError(path, expected="as many keys as values, frozen and trainable", found=told)
    for kind in ("frozen", "trainable"):
        pairs = zip(lists[f"{kind}_keys"], lists[f"{kind}_values"], strict=True)
        lengths = {array.shape[1] for pair in pairs for array in pair}
        if len(lengths) > 1:
            found = " and ".join(map(str, sorted(lengths)))
            raise FormatError(path, expected=f"as many {kind} slots in every layer", found=found)
    heads = {(array.shape[0], str(array.dtype)) for arrays in lists.values() for array in arrays}
    if len(heads) > 1:
        found = " and ".join(f"{count} in {dtype}" for count, dtype in sorted(heads))
        raise FormatError(path, expected="one number of heads and one dtype", found=found)
    total = sum(lists[name][0].shape[1] for name in ("frozen_keys", "trainable_keys"))
    if not total:
        raise FormatError(path, expected="at least one slot", found="none")
