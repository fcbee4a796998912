"""A contact sheet: some pictures of a data set as training sees them, each with its caption and bucket."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from framework.data.checks import CheckedSample
from framework.data.clips import read_preview
from framework.data.images import decode_image
from framework.data.inspect import bucket_text
from framework.data.media import Bucket, Media, size_px_of
from framework.data.places import Place, is_clip, read_place_bytes

MAX_PICTURES = 60
_COLUMNS = 6
_SIDE_PX = 220  # longer side of a picture
_CONTROL_PX = 64
_GAP_PX = 16
_FONT_PX = 13
_LINE_PX = 17
_NUM_LINES = 5  # the bucket and a caption of up to four lines
_LINE_CHARACTERS = 34
_PAPER = (255, 255, 255)
_INK = (33, 37, 41)
_FAINT = (108, 117, 125)
_LEFT_OUT = (214, 51, 132)  # what a mask keeps out of the loss is tinted


def contact_sheet(
    samples: Sequence[CheckedSample], buckets: Sequence[Bucket], media: Media
) -> Image.Image:
    """Draw up to 60 samples, evenly chosen; the crop is that of training.

    buckets: of each sample. What a mask keeps out of the loss is tinted; control pictures stand in the lower corner.
    Reads the pictures. Raises DataError for one that can't be read any more, ValueError without samples.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one picture")
    shown = min(MAX_PICTURES, len(samples))
    chosen = [index * len(samples) // shown for index in range(shown)]
    columns = min(_COLUMNS, shown)
    rows = -(-shown // columns)
    cell_height = _SIDE_PX + _NUM_LINES * _LINE_PX + _GAP_PX
    sheet = Image.new(
        "RGB",
        (columns * (_SIDE_PX + _GAP_PX) + _GAP_PX, rows * cell_height + _GAP_PX),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PX)
    for number, index in enumerate(chosen):
        row, column = divmod(number, columns)
        left = _GAP_PX + column * (_SIDE_PX + _GAP_PX)
        top = _GAP_PX + row * cell_height
        picture = _picture(samples[index], buckets[index], media)
        sheet.paste(picture, (left, top + _SIDE_PX - picture.height))
        lines = _caption_lines(samples[index].sample.caption)
        draw.text((left, top + _SIDE_PX + 3), bucket_text(buckets[index]), _FAINT, font)
        for line, text in enumerate(lines, start=1):
            draw.text((left, top + _SIDE_PX + 3 + line * _LINE_PX), text, _INK, font)
    return sheet


def _picture(checked: CheckedSample, bucket: Bucket, media: Media) -> Image.Image:
    width, height = size_px_of(bucket)
    scale = _SIDE_PX / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sample = checked.sample
    as_clip = media.kind == "video" and is_clip(sample.picture)
    picture = ImageOps.fit(_decode(sample.picture, as_clip), size)
    if sample.mask is not None:
        mask = _decode(sample.mask).convert("L").resize(checked.size)
        left_out = ImageChops.invert(ImageOps.fit(mask, size)).point(lambda value: value // 2)
        picture.paste(Image.new("RGB", size, _LEFT_OUT), mask=left_out)
    left = 0
    for control in sample.controls if media.num_controls else ():
        small = ImageOps.contain(_decode(control), (_CONTROL_PX, _CONTROL_PX))
        framed = ImageOps.expand(small, border=2, fill=_PAPER)
        picture.paste(framed, (left, size[1] - framed.height))
        left += framed.width
    return picture


def _decode(place: Place, as_clip: bool = False) -> Image.Image:
    data = read_place_bytes(place)
    return read_preview(place, data) if as_clip else decode_image(data, name=str(place))


def _caption_lines(caption: str) -> list[str]:
    """The caption in the room that there is; the font of Pillow lacks letters of many scripts."""
    text = caption or "(no caption)"
    return textwrap.wrap(
        text, _LINE_CHARACTERS, max_lines=_NUM_LINES - 1, placeholder=" …", break_on_hyphens=False
    )
