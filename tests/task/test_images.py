"""How a model's own folder says that images are prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixkit.errors import BackboneError
from prefixkit.format.manifest import ImageRecord
from prefixkit.task import image_task

HALF = (0.5, 0.5, 0.5)
MEAN = (0.485, 0.456, 0.406)


def record(tmp_path: Path, channels: int = 3, **stored: Any) -> ImageRecord:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    found = image_task(tmp_path, channels).image
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("stored", "size", "mean"),
    [
        ({"size": {"height": 16, "width": 24}, "image_mean": MEAN}, (16, 24), MEAN),
        ({"size": 32}, (32, 32), HALF),
        ({"size": {"shortest_edge": 8}, "image_mean": 0.25}, (8, 8), (0.25, 0.25, 0.25)),
        # DeiT and DINOv2 cut the middle out of a larger image; a model reads what is left.
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            224,
            HALF,
        ),
        ({"size": 256, "do_center_crop": False, "crop_size": 224}, 256, HALF),
        ({"size": 8, "do_normalize": False, "image_mean": MEAN}, 8, (0.0, 0.0, 0.0)),
        ({"size": 8, "rescale_factor": 1 / 255}, 8, HALF),
    ],
)
def test_records(tmp_path: Path, stored: dict[str, Any], size: Any, mean: tuple[float, ...]) -> None:
    found = record(tmp_path, **stored)
    assert (found.height, found.width) == (size if isinstance(size, tuple) else (size, size))
    assert found.mean == mean
    assert found.std == ((1.0, 1.0, 1.0) if stored.get("do_normalize") is False else HALF)


def test_one_channel(tmp_path: Path) -> None:
    assert record(tmp_path, channels=1, size=8, image_mean=[0.1], image_std=[0.3]).std == (0.3,)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "expected how images are prepared; found none; AutoImageProcessor"),
        ("{", "found an unreadable one"),
        ("{}", "found an unreadable one"),
        ('{"size": {"longest_edge": 8}}', "found an unreadable one"),
        ('{"size": 8, "do_center_crop": true}', "found an unreadable one"),
        ('{"size": 8, "rescale_factor": 0.5}', "expected a rescale_factor of 1/255; found 0.5"),
    ],
)
def test_folders_that_do_not_say_it_are_refused(tmp_path: Path, stored: str | None, message: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    if stored is not None:
        path.write_text(stored)
    with pytest.raises(BackboneError) as error:
        image_task(tmp_path, 3)
    assert str(error.value).startswith(f"{path}: expected")
    assert message in str(error.value)
