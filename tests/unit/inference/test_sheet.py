from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framework.inference import sheet as sheet_module
from framework.inference.sheet import sample_sheet, save_png

RED, BLUE = (200, 30, 30), (30, 30, 200)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def boxes_of(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return np.argwhere((np.asarray(image) == color).all(-1))


def test_small_pictures_are_enlarged_and_rows_stand_in_order() -> None:
    image = sample_sheet(
        [("before", [picture(RED), picture(RED)]), ("after", [picture(BLUE), picture(BLUE)])],
        ["a red apple", "a house"],
    )
    assert image.mode == "RGB"
    red, blue = boxes_of(image, RED), boxes_of(image, BLUE)
    assert len(red) == len(blue) == 2 * 192 * 192
    assert red[:, 0].max() < blue[:, 0].min()
    assert red[:, 1].min() == blue[:, 1].min()
    assert (np.asarray(image)[0] == 255).all()


def test_captions_stand_above_and_titles_beside() -> None:
    image = sample_sheet([("before", [picture(RED)])], ["a red apple"])
    top, left = boxes_of(image, RED).min(0)
    array = np.asarray(image)
    assert (array[:top, left:] < 128).any()
    assert (array[top:, : left - 2] < 160).any()


def test_large_and_wide_pictures_keep_their_shape() -> None:
    image = sample_sheet([("after", [picture(RED, (1024, 512))])], ["wide"])
    found = boxes_of(image, RED)
    height, width = found.max(0) - found.min(0) + 1
    assert (width, height) == (512, 256)


def test_many_columns_go_on_below() -> None:
    six = sample_sheet([("after", [picture(RED)] * 6)], ["x"] * 6)
    seven = sample_sheet([("after", [picture(RED)] * 7)], ["x"] * 7)
    assert seven.width == six.width
    assert seven.height > 1.8 * six.height - 48
    assert len(boxes_of(seven, RED)) == 7 * 192 * 192


@pytest.mark.parametrize("caption", ["", "word " * 500, "w" * 500, "猫と犬", "a\nb\tc"])
def test_any_caption_fits(caption: str) -> None:
    image = sample_sheet([("after", [picture(RED)])], [caption])
    assert image.width < 400
    assert image.height < 400


def test_pictures_with_transparency_or_grey_are_drawn() -> None:
    pictures = [Image.new("RGBA", (64, 64), (*RED, 255)), Image.new("L", (64, 64), 77)]
    image = sample_sheet([("after", pictures)], ["a", "b"])
    assert len(boxes_of(image, (77, 77, 77))) == 192 * 192


def test_rows_must_match_the_captions() -> None:
    with pytest.raises(ValueError, match="row 'after' has 1 pictures, not 2"):
        sample_sheet([("after", [picture(RED)])], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        sample_sheet([], ["a"])
    with pytest.raises(ValueError, match="at least one row"):
        sample_sheet([("after", [])], [])


def test_png_carries_text_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "sheet.png"
    save_png(picture(RED), path)
    save_png(picture(BLUE), path, {"prompt": "ein Häuschen, 猫", "seed": "3"})
    with Image.open(path) as image:
        image.load()
        assert image.getpixel((0, 0)) == BLUE
        assert image.text == {"prompt": "ein Häuschen, 猫", "seed": "3"}
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sheet.png"
    save_png(picture(RED), path)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(sheet_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(picture(BLUE), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
