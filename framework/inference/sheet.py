"""Draw the sample sheet: one column per prompt, one row per moment of a run, so that both can be compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from framework.models.base import Clip, Sample

SheetRow = tuple[str, Sequence[Image.Image]]

SMALLEST_PX = 192
LARGEST_PX = 512
MAX_COLUMNS = 6
MAX_FRAMES = 5
MAX_CAPTION_LINES = 4
_MARGIN_PX = 24
_GAP_PX = 12
_CAPTION_FONT_PX = 15
_TITLE_FONT_PX = 17
_INK = (33, 37, 41)
_FAINT = (108, 117, 125)
_PAPER = (255, 255, 255)
_FRAME = (222, 226, 230)


def sample_sheet(rows: Sequence[SheetRow], captions: Sequence[str]) -> Image.Image:
    """Lay pictures out with a caption above each column and a title beside each row.

    rows: (title, one picture per caption), e.g. ("before", ...), ("after", ...).
    Small pictures are enlarged to 192 px along their longer side and large ones reduced to 512 px.
    More than 6 columns continue in a further block below. Raises ValueError where a row has another
    number of pictures than there are captions, or where there is nothing to draw.
    """
    if not rows or not captions:
        raise ValueError("a sheet needs at least one row and one caption")
    for title, pictures in rows:
        if len(pictures) != len(captions):
            raise ValueError(f"row {title!r} has {len(pictures)} pictures, not {len(captions)}")
    blocks = [
        _draw_block([(t, pictures[i : i + MAX_COLUMNS]) for t, pictures in rows], captions[i : i + MAX_COLUMNS])
        for i in range(0, len(captions), MAX_COLUMNS)
    ]  # fmt: skip
    width = max(block.width for block in blocks)
    height = sum(block.height for block in blocks)
    sheet = Image.new("RGB", (width + 2 * _MARGIN_PX, height + 2 * _MARGIN_PX), _PAPER)
    top = _MARGIN_PX
    for block in blocks:
        sheet.paste(block, (_MARGIN_PX, top))
        top += block.height
    return sheet


def save_png(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG, with `text` as its text chunks, so that `path` holds a whole picture or its old one."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    _write(path, lambda file: image.save(file, format="PNG", pnginfo=chunks))


def save_sample(sample: Sample, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write what was sampled as a PNG with `text`; of a clip some frames, and the film, `<name>.webp`, beside it."""
    save_png(as_picture(sample), path, text)
    if isinstance(sample, Clip):
        first, *others = sample.frames
        _write(
            path.with_suffix(".webp"),
            lambda file: first.save(
                file,
                format="WEBP",
                save_all=True,
                append_images=others,
                duration=round(1000 / sample.fps),
                loop=0,
                quality=90,
            ),
        )


def as_picture(sample: Sample) -> Image.Image:
    """A picture itself; of a clip at most `MAX_FRAMES` of its frames side by side, first and last among them."""
    if isinstance(sample, Image.Image):
        return sample
    count = min(MAX_FRAMES, len(sample.frames))
    last = len(sample.frames) - 1
    shown = [sample.frames[round(place * last / max(1, count - 1))] for place in range(count)]
    width, height = shown[0].size
    strip = Image.new("RGB", (width * count, height), _PAPER)
    for place, frame in enumerate(shown):
        strip.paste(frame, (place * width, 0))
    return strip


def _write(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Let `save` write a file that is at `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_block(rows: Sequence[SheetRow], captions: Sequence[str]) -> Image.Image:
    """One band of columns: captions on top, then the rows."""
    caption_font = ImageFont.load_default(_CAPTION_FONT_PX)
    title_font = ImageFont.load_default(_TITLE_FONT_PX)
    cells = [[_resize(picture) for picture in pictures] for _, pictures in rows]
    column_width = max(SMALLEST_PX, *(cell.width for row in cells for cell in row))
    row_heights = [max(cell.height for cell in row) for row in cells]
    wrapped = [_wrap(caption, caption_font, column_width) for caption in captions]
    line_height = _CAPTION_FONT_PX + 4
    caption_height = max(len(lines) for lines in wrapped) * line_height + _GAP_PX
    gutter = max(round(title_font.getlength(title)) for title, _ in rows) + 2 * _GAP_PX

    width = gutter + len(captions) * (column_width + _GAP_PX)
    height = caption_height + sum(row_heights) + _GAP_PX * (len(rows) + 1)
    block = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(block)
    for column, lines in enumerate(wrapped):
        left = gutter + column * (column_width + _GAP_PX)
        # Short captions stand just above their pictures, not at the top of the band.
        top = caption_height - _GAP_PX - len(lines) * line_height
        for number, line in enumerate(lines):
            draw.text((left, top + number * line_height), line, font=caption_font, fill=_INK)
    top = caption_height
    for (title, _), row, row_height in zip(rows, cells, row_heights, strict=True):
        draw.text((0, top + row_height // 2), title, font=title_font, fill=_FAINT, anchor="lm")
        for column, cell in enumerate(row):
            left = gutter + column * (column_width + _GAP_PX)
            block.paste(cell, (left, top))
            frame = (left - 1, top - 1, left + cell.width, top + cell.height)
            draw.rectangle(frame, outline=_FRAME)
        top += row_height + _GAP_PX
    return block


def _resize(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    scale = min(max(longest, SMALLEST_PX), LARGEST_PX) / longest
    if scale == 1:
        return picture.convert("RGB")
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines of at most `width` px; what is beyond the last allowed line becomes "…"."""
    lines: list[str] = []
    current = ""
    for word in text.split() or ["(empty prompt)"]:
        longer = f"{current} {word}" if current else word
        if current and font.getlength(longer) > width:
            lines.append(current)
            current = word
        else:
            current = longer
    lines.append(current)
    if len(lines) > MAX_CAPTION_LINES:
        lines = [*lines[: MAX_CAPTION_LINES - 1], lines[MAX_CAPTION_LINES - 1] + " …"]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a line that a single long word makes wider than its column."""
    if font.getlength(line) <= width:
        return line
    while len(line) > 1 and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
