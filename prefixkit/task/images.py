"""The usage contract of images: how a model's own folder says that they are prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixkit.errors import BackboneError
from prefixkit.format.manifest import ImageRecord, TaskRecord

_FILE = "preprocessor_config.json"
_BYTE = 1 / 255


def image_task(folder: str | Path, channels: int) -> TaskRecord:
    """The classification of images for the model in `folder`, without labels yet.

    Raises:
        BackboneError: no preprocessor_config.json, or one that prepares images as the contract cannot say.
    """
    return TaskRecord(
        name="images",
        input_template="{image}",
        separator="",
        target_template="{target}",
        bos="none",
        stop=(),
        max_length=1,
        answer="label",
        image=image_record(Path(folder), channels),
    )


def image_record(folder: Path, channels: int) -> ImageRecord:
    """How `folder` says that images are prepared. Raises BackboneError."""
    path = folder / _FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # A crop at the centre leaves what the model reads; here the whole image is resized to that.
        height, width = _size(stored["crop_size"] if stored.get("do_center_crop") else stored.get("size"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "none" if isinstance(error, FileNotFoundError) else f"an unreadable one ({error})"
        step = "AutoImageProcessor.from_pretrained(MODEL).save_pretrained(FOLDER) writes it"
        raise BackboneError(path, expected="how images are prepared", found=found, next_step=step) from error
    if stored.get("do_rescale", True) and abs(stored.get("rescale_factor", _BYTE) - _BYTE) > 1e-6:
        found = f"{stored['rescale_factor']}"
        raise BackboneError(path, expected="a rescale_factor of 1/255", found=found)
    plain = not stored.get("do_normalize", True)
    mean = _numbers(0.0 if plain else stored.get("image_mean", 0.5), channels)
    std = _numbers(1.0 if plain else stored.get("image_std", 0.5), channels)
    return ImageRecord(height=height, width=width, channels=channels, mean=mean, std=std)


def _size(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])


def _numbers(given: Any, channels: int) -> tuple[float, ...]:
    each = list(given) if isinstance(given, list) else [given]
    return tuple(float(number) for number in (each * channels if len(each) == 1 else each))
