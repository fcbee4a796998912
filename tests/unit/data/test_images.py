from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from framework.data.images import (
    build_pixels,
    content_key,
    decode_image,
    read_image,
    read_image_size,
)
from framework.data.samples import Sample
from framework.errors import DataError


def encode(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    picture = decode_image(data, name="picture")
    assert picture.mode == "RGB"
    return np.asarray(picture)


def rgb(picture: Image.Image, form: str = "PNG", **options: Any) -> list[int]:
    """The only colour of a picture of one colour."""
    values = decode(encode(picture, form, **options))
    assert (values == values[0, 0]).all()
    return values[0, 0].tolist()


class TestModes:
    def test_rgb_is_untouched(self) -> None:
        values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        assert (decode(encode(Image.fromarray(values))) == values).all()

    def test_greyscale(self) -> None:
        assert rgb(Image.new("L", (4, 4), 77)) == [77, 77, 77]

    @pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 255)])
    def test_one_bit(self, value: int, expected: int) -> None:
        assert rgb(Image.new("1", (9, 4), value)) == [expected] * 3

    def test_alpha_lies_on_white(self) -> None:
        assert rgb(Image.new("RGBA", (4, 4), (200, 0, 100, 255))) == [200, 0, 100]
        assert rgb(Image.new("RGBA", (4, 4), (200, 0, 100, 0))) == [255, 255, 255]
        assert rgb(Image.new("RGBA", (4, 4), (200, 0, 100, 51))) == [244, 204, 224]

    def test_grey_with_alpha_lies_on_white(self) -> None:
        assert rgb(Image.new("LA", (4, 4), (100, 0))) == [255, 255, 255]
        assert rgb(Image.new("LA", (4, 4), (100, 102))) == [193, 193, 193]

    def test_palette(self) -> None:
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([9, 9, 9, 10, 20, 30])
        assert rgb(picture) == [10, 20, 30]
        assert rgb(picture, transparency=1) == [255, 255, 255]
        assert rgb(picture, transparency=0) == [10, 20, 30]
        assert rgb(picture, transparency=bytes([255, 51])) == [206, 208, 210]
        assert rgb(picture, "GIF", transparency=1) == [255, 255, 255]

    def test_colours_that_stand_for_transparent(self) -> None:
        assert rgb(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)) == [255] * 3
        assert rgb(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 4)) == [1, 2, 3]
        assert rgb(Image.new("L", (4, 4), 50), transparency=50) == [255] * 3

    def test_cmyk_without_profile(self) -> None:
        for form in ("TIFF", "JPEG"):
            options = {"quality": 100} if form == "JPEG" else {}
            value = rgb(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), form, **options)
            assert np.abs(np.array(value) - [0, 255, 255]).max() <= 2
        assert rgb(Image.new("CMYK", (8, 8), (0, 0, 0, 128)), "TIFF") == [127, 127, 127]

    def test_other_colour_models(self) -> None:
        lab = Image.new("LAB", (4, 4), (128, 128, 128))
        assert np.ptp(rgb(lab, "TIFF")) <= 2
        assert rgb(Image.new("YCbCr", (8, 8), (120, 128, 128)), "TIFF") == [120, 120, 120]


class TestDeepPictures:
    @pytest.mark.parametrize(
        ("deep", "expected"), [(0, 0), (65535, 255), (32768, 128), (257, 1), (128, 0), (129, 1)]
    )
    def test_16_bit_is_scaled_not_clipped(self, deep: int, expected: int) -> None:
        picture = Image.fromarray(np.full((4, 4), deep, np.uint16))
        assert rgb(picture, "PNG") == [expected] * 3
        assert rgb(picture, "TIFF") == [expected] * 3

    def test_16_bit_keeps_its_gradient(self) -> None:
        ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
        picture = Image.fromarray(np.tile(ramp, (4, 1)))
        assert (decode(encode(picture))[0, :, 0] == np.arange(256)).all()

    def test_16_bit_with_a_transparent_value(self) -> None:
        values = np.array([[1000, 65535 // 2]], np.uint16)
        plain = encode(Image.fromarray(values))
        marked = encode(Image.fromarray(values), transparency=1000)
        assert decode(plain)[0].tolist() == [[4] * 3, [127] * 3]
        assert decode(marked)[0].tolist() == [[255] * 3, [127] * 3]

    def test_32_bit_integers_count_as_16_bit(self) -> None:
        assert rgb(Image.fromarray(np.full((4, 4), 32768, np.int32)), "TIFF") == [128] * 3
        data = encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF")
        with pytest.raises(DataError, match="70000"):
            decode(data)

    @pytest.mark.parametrize(
        ("high", "value", "expected"),
        [(1.0, 0.5, 128), (255.0, 100.0, 100), (65535.0, 32768.0, 128)],
    )
    def test_float(self, high: float, value: float, expected: int) -> None:
        picture = Image.fromarray(np.array([[0.0, value, high]], np.float32))
        assert decode(encode(picture, "TIFF"))[0, :, 0].tolist() == [0, expected, 255]

    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e6])
    def test_float_out_of_range(self, value: float) -> None:
        data = encode(Image.fromarray(np.array([[0.0, value]], np.float32)), "TIFF")
        with pytest.raises(DataError, match="grey values from"):
            decode(data)

    def test_pgm(self) -> None:
        data = b"P5 2 1 65535\n" + (65535).to_bytes(2, "big") + (32768).to_bytes(2, "big")
        assert decode(data)[0, :, 0].tolist() == [255, 128]

    @pytest.mark.parametrize("turn", [3, 6])
    def test_turned_16_bit(self, turn: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = turn
        picture = Image.fromarray(np.array([[0, 65535]], np.uint16))
        values = decode(encode(picture, exif=exif))
        assert values[..., 0].tolist() == ([[255, 0]] if turn == 3 else [[0], [255]])


class TestOrientation:
    CORNERS = np.array(
        [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]], [[0, 0, 0], [9, 9, 9]]],
        np.uint8,
    )

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation(self, orientation: int, tmp_path: Path) -> None:
        """The stored picture is the upright one, turned so that its EXIF tag undoes it."""
        undo = {
            1: lambda a: a,
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a),
            7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
            8: lambda a: np.rot90(a, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / "a.png"
        Image.fromarray(np.ascontiguousarray(undo(self.CORNERS))).save(file, exif=exif)
        sample = Sample(file, "")
        assert (np.asarray(read_image(sample)) == self.CORNERS).all()
        assert read_image_size(sample) == (2, 3)

    def test_size_of_a_turned_jpeg(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
        assert read_image_size(Sample(tmp_path / "a.jpg", "")) == (20, 30)
        assert read_image(Sample(tmp_path / "a.jpg", "")).size == (20, 30)


class TestProfiles:
    def test_srgb_is_untouched(self) -> None:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        assert rgb(Image.new("RGB", (4, 4), (200, 50, 100)), icc_profile=srgb.tobytes()) == [
            200,
            50,
            100,
        ]

    def test_a_gamma_of_one_is_brightened(self) -> None:
        assert rgb(
            Image.new("RGB", (4, 4), (55, 55, 55)), icc_profile=linear_profile()
        ) == pytest.approx([128] * 3, abs=2)
        rgba = Image.new("RGBA", (4, 4), (55, 55, 55, 255))
        assert rgb(rgba, icc_profile=linear_profile()) == pytest.approx([128] * 3, abs=2)

    def test_profiles_that_do_not_fit_are_passed_over(self) -> None:
        assert rgb(Image.new("RGB", (4, 4), (1, 2, 3)), icc_profile=b"no profile") == [1, 2, 3]
        assert rgb(Image.new("L", (4, 4), 55), icc_profile=linear_profile()) == [55] * 3


class TestFrames:
    @pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_the_first_frame_is_taken(self, form: str) -> None:
        frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
        options = {"lossless": True} if form == "WEBP" else {}
        value = rgb(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert value == [255, 0, 0]


class TestBrokenPictures:
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_truncated(self, form: str) -> None:
        noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = encode(Image.fromarray(noise), form)
        decode(data)
        with pytest.raises(DataError, match=r"^picture: the picture can't be read\n  Found: \S"):
            decode(data[: len(data) * 2 // 3])

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged metadata
    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "TGA"])
    def test_random_damage_never_escapes_as_another_error(self, form: str) -> None:
        random = np.random.default_rng(2)
        noise = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        data = np.frombuffer(encode(Image.fromarray(noise), form), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            damaged[random.integers(0, min(len(data), 200), 4)] = random.integers(0, 256, 4)
            try:
                decode(damaged.tobytes())
            except DataError:
                continue

    @pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
    def test_no_picture(self, data: bytes) -> None:
        with pytest.raises(DataError, match="can't be read"):
            decode(data)

    def test_a_bomb_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encode(Image.new("RGB", (40, 30)))
        for limit in (1000, 100):  # Pillow warns of the first and refuses the second
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(DataError, match="exceeds limit"):
                decode(data)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_bomb_is_refused_where_its_warning_is_ignored(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = encode(Image.new("RGB", (40, 30)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataError, match="too large"):
            decode(data)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"a\.png \(metadata\.csv:3\): the picture can't be read"
        ):
            read_image(Sample(tmp_path / "a.png", "", "metadata.csv:3"))


class TestPixels:
    def test_range_shape_and_type(self) -> None:
        for color, value in (((0, 0, 0), -1.0), ((255, 255, 255), 1.0)):
            pixels = build_pixels(Image.new("RGB", (50, 40), color), (32, 16))
            assert pixels.shape == (3, 16, 32)
            assert pixels.dtype == torch.float32
            assert pixels.is_contiguous()
            assert (pixels == value).all()

    def test_same_size_is_exact(self) -> None:
        values = np.random.default_rng(3).integers(0, 256, (16, 32, 3), dtype=np.uint8)
        pixels = build_pixels(Image.fromarray(values), (32, 16))
        restored = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert (restored == values).all()

    def test_crops_the_middle(self) -> None:
        picture = Image.new("RGB", (48, 16), "black")
        picture.paste((255, 255, 255), (16, 0, 32, 16))
        assert (build_pixels(picture, (16, 16)) == 1.0).all()
        assert (build_pixels(picture.rotate(90, expand=True), (16, 16)) == 1.0).all()

    def test_shrinks_with_antialiasing(self) -> None:
        stripes = np.zeros((128, 128, 3), np.uint8)
        stripes[:, ::2] = 255
        pixels = build_pixels(Image.fromarray(stripes), (16, 16))
        assert pixels.abs().max() < 0.05

    def test_enlarges(self, write_picture: Callable[..., Path]) -> None:
        picture = read_image(Sample(write_picture("a.png", (3, 2)), ""))
        assert build_pixels(picture, (32, 16)).shape == (3, 16, 32)


def test_content_key_follows_the_bytes() -> None:
    assert content_key(b"a") == content_key(b"a") != content_key(b"b")
    assert len(content_key(b"")) == 64


def linear_profile() -> bytes:
    """An RGB profile with sRGB's primaries and gamma 1, made from Pillow's own sRGB profile."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(int.from_bytes(data[128:132], "big")):
        start = 132 + 12 * entry
        name = bytes(data[start : start + 4])
        offset = int.from_bytes(data[start + 4 : start + 8], "big")
        size = int.from_bytes(data[start + 8 : start + 12], "big")
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + 12] = b"curv" + bytes(4) + (0).to_bytes(4, "big")
        elif name == b"desc":
            text = bytes(data[offset : offset + size])
            for code in ("ascii", "utf-16-be"):
                text = text.replace("sRGB".encode(code), "line".encode(code))
            data[offset : offset + size] = text
    return bytes(data)
