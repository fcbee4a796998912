"""From an encoded picture to pixels: every mode of Pillow becomes right 8-bit sRGB, then a tensor.

H, W: picture height and width in pixels.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from framework.data.media import Size
from framework.data.sample import Sample, read_picture_bytes
from framework.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

# Part of every cache key: raise it when a change here alters a single pixel.
IMAGE_TRANSFORM_VERSION = 1

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_MAX_16_BIT = 65535
# Pillow's decoders answer damaged files with any of these.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
    EOFError, MemoryError, NotImplementedError, RuntimeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

# Pillow only warns of a small file that claims a huge picture; here that is a broken picture.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def content_key(data: bytes) -> str:
    """Name a picture by its content (sha256 of the encoded bytes), so that moving it changes nothing."""
    return hashlib.sha256(data).hexdigest()


def read_image(sample: Sample) -> Image.Image:
    """Read a sample's picture as upright RGB on white. Raises DataError; see `decode_image`."""
    return decode_image(read_picture_bytes(sample), name=sample.name)


def read_image_size(sample: Sample) -> Size:
    """Read (width, height) in pixels as the picture is seen (EXIF turned), without decoding it."""
    with _open(read_picture_bytes(sample), sample.name) as picture:
        try:
            turned = picture.getexif().get(_ORIENTATION) in _TURNED
        except DECODE_ERRORS as error:
            raise _broken(sample.name, error) from error
        return (picture.height, picture.width) if turned else picture.size


def decode_image(data: bytes, *, name: str) -> Image.Image:
    """Decode a picture to 8-bit RGB, as a viewer would show it on a white page.

    EXIF orientation is applied; of an animation the first frame is taken; transparency is laid on
    white; 16-bit and float greyscale are scaled, not clipped; an embedded colour profile is
    converted to sRGB (a profile that is damaged or made for another mode is passed over, as
    browsers do); CMYK without a profile is converted by Pillow's formula.
    name: for messages.
    Raises DataError for damaged, truncated, unknown or implausibly large pictures.
    """
    with _open(data, name) as picture:
        try:
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
        except DECODE_ERRORS as error:
            raise _broken(name, error) from error


def flatten_frame(frame: Image.Image) -> Image.Image:
    """One loaded frame of an animation as RGB on white; see `decode_image`."""
    return _to_rgb(frame)


def build_pixels(picture: Image.Image, size: Size) -> Tensor:
    """Scale a picture (Lanczos, antialiased) to cover `size`, crop the middle, make it a tensor.

    picture: RGB.   size: (width, height) in pixels; smaller pictures are enlarged.
    Returns (3, H, W) float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1.
    """
    import torch

    fitted = ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32)).permute(2, 0, 1)
    return (pixels / 127.5 - 1.0).contiguous()


def build_mask(mask: Image.Image, size: Size, *, picture_size: Size) -> Tensor:
    """Scale and crop a mask exactly as `build_pixels` does its picture, which may have more or fewer pixels.

    mask: any mode; its lightness counts.   size, picture_size: (width, height) in pixels.
    Returns (1, H, W) float32 in [0, 1]: black becomes 0, white 1.
    """
    import torch

    grey = mask.convert("L")
    if grey.size != picture_size:
        grey = grey.resize(picture_size, Image.Resampling.BILINEAR)
    fitted = ImageOps.fit(grey, size, method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted, dtype=np.float32))[None] / 255.0


def picture_geometry(picture_size: Size, size: Size) -> tuple[int, int, int, int, int, int]:
    """What `build_pixels` does to a picture, as SDXL is told (Podell et al. 2023, arXiv:2307.01952, section 2.2).

    picture_size, size: (width, height) in pixels, of the picture and of the bucket.
    Returns (original height, original width, crop top, crop left, target height, target width); the crop is counted in
    pixels of the picture after scaling.
    """
    width, height = picture_size
    scale = max(size[0] / width, size[1] / height)
    top = round((height * scale - size[1]) / 2)
    left = round((width * scale - size[0]) / 2)
    return height, width, top, left, size[1], size[0]


def _open(data: bytes, name: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        reason = "empty file" if not data else "no picture format that Pillow reads"
        raise DataError("the picture can't be read", where=name, found=reason) from error
    except DECODE_ERRORS as error:
        raise _broken(name, error) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise DataError(
            "the picture is too large", where=name, found=f"{picture.size}, over {limit} pixels"
        )
    return picture


def _broken(name: str, error: BaseException) -> DataError:
    return DataError(
        "the picture can't be read", where=name, found=str(error) or type(error).__name__
    )


def _to_rgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    picture = _to_8_bit(picture)
    if picture.mode in ("La", "RGBa"):  # premultiplied alpha
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    alpha = None
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        alpha = rgba.getchannel("A")
        picture = picture.getchannel("L") if picture.mode == "LA" else rgba.convert("RGB")
    elif picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("RGB")
    picture = _to_srgb(picture, profile)
    if alpha is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    return picture


def _to_8_bit(picture: Image.Image) -> Image.Image:
    """Scale I;16, I and F to L (or LA where one grey value stands for transparent).

    Other modes have 8 bits already. F has no fixed range: the maximum decides whether 1, 255 or
    65535 is white (a guess).
    """
    if picture.mode != "F" and picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= _MAX_16_BIT):  # also true for NaN
        raise ValueError(f"grey values from {low:g} to {high:g}, outside of 0 to {_MAX_16_BIT}")
    white = float(_MAX_16_BIT)
    if picture.mode == "F":
        white = next(limit for limit in (1.0, 255.0, white) if high <= limit)
    grey = Image.fromarray(np.floor(values * (255.0 / white) + 0.5).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(opaque)))


def _to_srgb(picture: Image.Image, profile: object) -> Image.Image:
    """Convert L, RGB or CMYK to sRGB by the embedded profile, or plainly where none fits."""
    if isinstance(profile, bytes) and profile:
        space = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}[picture.mode]
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            is_srgb = ImageCms.getProfileDescription(source).startswith("sRGB IEC61966-2.1")
            if source.profile.xcolor_space.strip() == space.strip() and not is_srgb:
                target = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # documented in decode_image: such a profile is passed over
    return picture.convert("RGB")
