"""Labelled images: files and folders, and the preparation against the one that `transformers` has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from prefixkit.data.images import collate_images, encode_images, prepared, read_images
from prefixkit.data.labelled import LabelledExample
from prefixkit.errors import DataError
from prefixkit.format.manifest import ImageRecord, TaskRecord

RECORD = ImageRecord(height=16, width=12, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.5))
TASK = TaskRecord(
    name="images",
    input_template="{image}",
    separator="",
    target_template="{target}",
    bos="none",
    stop=(),
    max_length=1,
    labels=("cat", "dog"),
    answer="label",
    image=RECORD,
)
BYTE = 1 / 255


def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(16, 12), (40, 30), (9, 50), (8, 6), (16, 40)])
def test_preparation_is_that_of_transformers(shape: tuple[int, int]) -> None:
    size = {"height": RECORD.height, "width": RECORD.width}
    theirs = ViTImageProcessorPil(size=size, resample=2, image_mean=list(RECORD.mean), image_std=list(RECORD.std))
    image = noise(*shape, 3)
    wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
    # Pillow rounds to whole bytes after each of two passes; these are at most one byte apart, and nothing is resized
    # where the size is right.
    apart = (prepared(image, RECORD) - wanted).abs() * torch.tensor(RECORD.std)[:, None, None]
    assert apart.max() < (1e-6 if shape == (16, 12) else 1.01 * BYTE)


def test_preparation_by_hand() -> None:
    record = replace(RECORD, height=2, width=1)
    # Four columns to one: a triangle of twice the width, 1/3/3/1 of 8.
    image = np.array([[[0], [80], [160], [240]], [[8], [8], [8], [8]]], dtype=np.uint8)
    levels = torch.tensor([[(0 + 3 * 80 + 3 * 160 + 240) / 8], [8.0]]) / 255
    wanted = torch.stack([(levels - mean) / std for mean, std in zip(RECORD.mean, RECORD.std, strict=True)])
    assert torch.allclose(prepared(image, record), wanted, atol=1e-5)


def test_grey_images_fill_every_channel_and_colour_becomes_grey() -> None:
    grey = prepared(noise(16, 12, 1), replace(RECORD, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert grey.shape == (3, 16, 12)
    assert torch.equal(grey[0], grey[1])
    one = replace(RECORD, channels=1, mean=(0.0,), std=(1.0,))
    image = noise(16, 12, 3)
    assert np.allclose(prepared(image, one)[0].numpy(), image.mean(axis=2) / 255, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 4, 1), (3, 5, 4, 3)])
def test_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([1, 0, 1]))
    found = read_images(tmp_path / "d.npz")
    assert [example.answer for example in found] == ["1", "0", "1"]
    assert found[1].where == f"{tmp_path / 'd.npz'}:1"
    assert np.array_equal(found[1].fields["image"], images[1].reshape(5, 4, -1))


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    colour, grey = noise(5, 4, 3), noise(5, 4)
    for folder in ("dog", "cat", "empty"):
        (tmp_path / folder).mkdir()
    Image.fromarray(colour).save(tmp_path / "dog" / "b.png")
    Image.fromarray(colour).save(tmp_path / "dog" / "a.JPG", format="JPEG")
    Image.fromarray(grey).save(tmp_path / "cat" / "z.bmp")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no folder")
    found = read_images(tmp_path)
    assert [(example.answer, Path(example.where).name) for example in found] == [
        ("cat", "z.bmp"),
        ("dog", "a.JPG"),
        ("dog", "b.png"),
    ]
    assert np.array_equal(found[2].fields["image"], colour)
    assert np.array_equal(found[0].fields["image"], np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": noise(2, 4, 4)}, "expected an .npz of `images` and `labels`; found labels is not a file"),
        ({"labels": np.zeros(2)}, "expected an .npz of `images` and `labels`"),
        ({"images": noise(2, 4, 4) / 255, "labels": np.zeros(2)}, "expected `images` as uint8 .*; found float64"),
        ({"images": noise(2, 4), "labels": np.zeros(2)}, r"expected `images` as uint8 .*; found uint8 \[2, 4\]"),
        ({"images": noise(2, 4, 4), "labels": np.zeros(3)}, r"expected `labels` \[2\]; found \[3\]"),
        ({"images": noise(2, 4, 4), "labels": np.zeros((2, 1))}, r"expected `labels` \[2\]; found \[2, 1\]"),
        ({"images": noise(2, 0, 4), "labels": np.zeros(2)}, r"expected images with a height.*; found \[2, 0, 4\]"),
        ({"images": noise(2, 4, 4, 2), "labels": np.zeros(2)}, r"1, 3 or 4 channels; found \[2, 4, 4, 2\]"),
        ({"images": noise(0, 4, 4), "labels": np.zeros(0)}, "expected at least one image"),
        ({"images": noise(2, 4, 4), "labels": np.array([{}, 1])}, "expected an .npz"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as error:
        read_images(tmp_path / "d.npz")
    assert str(error.value).startswith(f"{tmp_path / 'd.npz'}: expected")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text", "cut"])
def test_files_that_are_no_arrays_are_refused(tmp_path: Path, content: bytes | str) -> None:
    if content == "cut":
        np.savez_compressed(tmp_path / "d.npz", images=noise(2, 40, 40), labels=np.zeros(2))
        whole = (tmp_path / "d.npz").read_bytes()
        content = whole[:300] + bytes(900) + whole[1200:]
    assert isinstance(content, bytes)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"expected an \.npz of `images` and `labels`"):
        read_images(tmp_path / "d.npz")


def test_one_array_alone_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", noise(2, 4, 4))
    with pytest.raises(DataError, match=r"expected an \.npz of `images` and `labels`"):
        read_images(tmp_path / "d.npy")


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_images(tmp_path / "d.npz")
    with pytest.raises(DataError, match="expected at least one image; found none; put a folder for each class"):
        read_images(tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut", "header"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cat" / "a.png"
    path.parent.mkdir()
    Image.fromarray(noise(40, 40, 3)).save(path)
    whole = path.read_bytes()
    # The name of the block behind the header.
    broken = whole[:37] + b"\x00\x01\x02\x03" + whole[41:]
    path.write_bytes({"text": b"no image", "cut": whole[: len(whole) // 2], "header": broken}[damage])
    with pytest.raises(DataError, match=r"cat/a\.png: expected an image; found") as error:
        read_images(tmp_path)
    assert "\n" not in str(error.value)


def test_batches_hold_pixels_and_the_numbers_of_labels() -> None:
    examples = [LabelledExample({"image": noise(16, 12, 3)}, label) for label in ("dog", "cat")]
    batch = collate_images(encode_images(TASK, examples))
    assert batch.inputs["pixel_values"].shape == (2, 3, 16, 12)
    assert (batch.labels.tolist(), batch.examples, batch.tokens) == ([1, 0], 2, 2)
    with pytest.raises(DataError, match="d:3: expected one of cat, dog; found 'cow'"):
        encode_images(TASK, [LabelledExample({"image": noise(16, 12, 3)}, "cow", "d:3")])


def test_what_is_transparent_keeps_its_colours() -> None:
    red = np.zeros((4, 4, 4), dtype=np.uint8)
    red[..., 0] = red[..., 3] = 255
    record = ImageRecord(height=4, width=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(prepared(red, record), prepared(red[..., :3], record))
    assert prepared(red, record)[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
