"""Labelled images: an `.npz` of `images` and `labels`, or a folder that holds a folder of images for each class."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.data.labelled import LabelledExample
from prefixkit.data.labelled_batches import LabelledBatch
from prefixkit.errors import DataError
from prefixkit.format.manifest import ImageRecord, TaskRecord

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_CHANNELS = (1, 3, 4)
_SHAPE = "`images` as uint8 [count, height, width] or [count, height, width, channels]"


@dataclass(frozen=True)
class ImageRow:
    """One prepared image [channels, height, width] and the number of its label."""

    pixels: Tensor
    label: int
    truncated: int = 0

    def __len__(self) -> int:
        return 1


def read_images(path: str | Path) -> list[LabelledExample]:
    """The images of an `.npz` file, or of a folder of folders, in order, as uint8 arrays [height, width, channels].

    Raises DataError for a missing file, arrays of other shapes or types, or images that cannot be read.
    """
    path = Path(path)
    found = list(_from_folder(path) if path.is_dir() else _from_npz(path))
    if not found:
        step = "put a folder for each class there" if path.is_dir() else "give one with some"
        raise DataError(path, expected="at least one image", found="none", next_step=step)
    return found


def _from_npz(path: Path) -> Iterator[LabelledExample]:
    try:
        with path.open("rb") as file:
            if not is_zipfile(file):
                raise ValueError("a file of another kind")
            with np.load(file, allow_pickle=False) as stored:
                images, labels = stored["images"], stored["labels"]
    except FileNotFoundError as error:
        raise DataError(path, expected="images", found="no such file", next_step="check the path") from error
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        found = (str(error) or "a file cut short").splitlines()[0].strip("'")
        raise DataError(path, expected="an .npz of `images` and `labels`", found=found) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(path, expected=_SHAPE, found=f"{images.dtype} {list(images.shape)}")
    if 0 in images.shape[1:] or (images.ndim == 4 and images.shape[3] not in _CHANNELS):
        expected = "images with a height, a width, and 1, 3 or 4 channels"
        raise DataError(path, expected=expected, found=f"{list(images.shape)}")
    if labels.shape != images.shape[:1]:
        raise DataError(path, expected=f"`labels` [{len(images)}]", found=f"{list(labels.shape)}")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield LabelledExample({"image": image if image.ndim == 3 else image[..., None]}, str(label), f"{path}:{index}")


def _from_folder(path: Path) -> Iterator[LabelledExample]:
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        for file in sorted(each for each in folder.iterdir() if each.suffix.lower() in _SUFFIXES):
            yield LabelledExample({"image": _opened(file)}, folder.name, str(file))


def _opened(file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        from PIL import Image
    except ImportError as error:
        step = "pip install 'prefixkit[vision]', or give an .npz"
        raise DataError(file, expected="Pillow to read images", found="none", next_step=step) from error
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    # A damaged PNG is a SyntaxError to Pillow.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(file, expected="an image", found=str(error).splitlines()[0]) from error


def encode_images(task: TaskRecord, examples: Sequence[LabelledExample]) -> list[ImageRow]:
    """Each image as the contract prepares it, with the number of its label. Raises DataError for an unknown label."""
    assert task.image is not None
    number = {label: index for index, label in enumerate(task.labels or ())}
    rows = []
    for example in examples:
        if example.answer not in number:
            raise DataError(example.where, expected=f"one of {', '.join(number)}", found=repr(example.answer))
        rows.append(ImageRow(prepared(example.fields["image"], task.image), number[example.answer]))
    return rows


def prepared(image: np.ndarray[Any, Any], record: ImageRecord) -> Tensor:
    """[channels, height, width]: resized, divided by 255, minus the mean, divided by the deviation."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    # What is transparent has a colour too: a folder's images are read the same way.
    pixels = pixels[:3] if pixels.shape[0] == 4 else pixels
    if pixels.shape[0] != record.channels:
        pixels = pixels.mean(dim=0, keepdim=True).expand(record.channels, -1, -1)
    if tuple(pixels.shape[1:]) != (record.height, record.width):
        size = (record.height, record.width)
        pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (record.mean, record.std))
    return (pixels / 255 - mean) / std


class ImageBatch(LabelledBatch):
    """Prepared images: `inputs` holds `pixel_values` [B, channels, height, width]."""

    @property
    def tokens(self) -> int:
        """Images, which have no tokens."""
        return len(self.labels)


def collate_images(rows: Sequence[ImageRow]) -> ImageBatch:
    """One batch of `rows` in order."""
    pixels = torch.stack([row.pixels for row in rows])
    return ImageBatch({"pixel_values": pixels}, torch.tensor([row.label for row in rows]))
