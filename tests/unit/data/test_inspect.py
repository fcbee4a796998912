"""`octavo data inspect`, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from framework.cli.main import main
from framework.data.inspect import bucket_text

WritePicture = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, write_picture: WritePicture) -> Path:
    for number in range(5):
        caption = " ".join(["word"] * (number + 1))
        write_picture(f"set/{number}.png", (96, 64), color=(number, 0, 0), caption=caption)
    write_picture("set/2_cat/upright.png", (64, 96), color="lime")
    write_picture("set/empty.png", (640, 640), color="blue", caption="")
    Image.new("L", (96, 64), 200).save(tmp_path / "set/0.mask.png")
    return tmp_path / "set"


def inspect(capsys: Capture, *arguments: object, code: int = 0) -> Any:
    assert main(["data", "inspect", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_counts(folder: Path, capsys: Capture) -> None:
    found = inspect(capsys, folder, "data.max_px=4096", "data.batch_size=2")
    assert (found["samples"], found["epoch_items"]) == (7, 8)
    assert [(b["bucket"], b["samples"], b["batches"], b["fill"]) for b in found["buckets"]] == [
        ("48 x 80", 1, 1, 0.5),
        ("64 x 64", 1, 1, 0.5),
        ("80 x 48", 5, 3, pytest.approx(5 / 6)),
    ]
    assert (found["smallest_px"], found["largest_px"]) == ([96, 64], [640, 640])
    assert (found["masks"], found["controls"], found["enlarged"]) == (1, {"0": 7}, 0)
    captions = found["captions"]
    assert (captions["missing"], captions["empty"], captions["unit"]) == (0, 1, "words")
    assert [c["length"] for c in captions["longest"]] == [5, 4, 3, 2, 1]
    assert captions["longest"][0]["name"] == str(folder / "4.png")
    assert found["broken"] == found["duplicates"] == found["errors"] == []


def test_everything_that_is_wrong_is_told_at_once(
    folder: Path, write_picture: WritePicture, capsys: Capture
) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "copy.txt").write_text("copy")
    (folder / "broken.png").write_bytes(b"nonsense")
    (folder / "broken.txt").write_text("broken")
    write_picture("set/bare.png")
    found = inspect(capsys, folder, code=1)
    assert found["samples"] == 8
    assert found["duplicates"] == [[str(folder / "1.png"), str(folder / "copy.png")]]
    assert [bad["name"] for bad in found["broken"]] == [str(folder / "broken.png")]
    assert found["captions"]["missing"] == 1
    assert "1 of 10 pictures have no caption" in found["errors"][0]

    assert main(["data", "inspect", str(folder)]) == 1
    printed = capsys.readouterr().out
    for words in ("Broken files (1)", "Duplicates (1)", "A run would stop", "640 x 640"):
        assert words in printed


def test_a_recipe_counts_tokens_and_sources(
    folder: Path, write_picture: WritePicture, capsys: Capture, tmp_path: Path
) -> None:
    for number in range(2):
        write_picture(f"other/{number}.png", caption="x")
    sources = (
        f"data.sources=[{{path: {folder}, weight: 1}}, {{path: {tmp_path / 'other'}, weight: 3}}]"
    )
    found = inspect(
        capsys, "recipe=pocket_lora", "data.path=null", sources, f"data.cache_dir={tmp_path}/cache"
    )
    assert found["captions"]["unit"] == "tokens"
    assert [source["samples"] for source in found["sources"]] == [7, 2]
    assert [source["share"] for source in found["sources"]] == pytest.approx([0.25, 0.75])


def test_control_pictures_and_clips(
    tmp_path: Path, write_picture: WritePicture, capsys: Capture
) -> None:
    write_picture("set/a.png", (64, 64), caption="a")
    write_picture("set/a.control.png", (32, 48))
    found = inspect(capsys, tmp_path / "set", "--family", "qwen_image_edit", "data.max_px=4096")
    assert found["controls"] == {"1": 1}
    assert found["buckets"][0]["bucket"] == "64 x 64 with 832 x 1248"
    assert bucket_text((64, 48, 81)) == "64 x 48, 81 frames"
    assert bucket_text((64, 48, 1)) == "64 x 48, 1 frame"


def test_contact_sheet(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    sheet = tmp_path / "out/sheet.png"
    assert main(["data", "inspect", str(folder), "--contact-sheet", str(sheet)]) == 0
    assert f"Contact sheet: {sheet}" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.width > picture.height > 300
        colors = {color for _, color in picture.getcolors(2**20) or []}
    assert {
        (0, 255, 0),
        (0, 0, 255),
        (3, 0, 0),
    } <= colors  # pictures without a mask are as they are
    assert (0, 0, 0) not in colors  # and the masked one isn't


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one path, or recipe=NAME"),
        (["a", "b"], "give one path"),
        (["{}", "data.max_pz=4"], "Nearest: data.max_px"),
        (["{}", "optim.lr=4"], "optim.lr: is not part of the data"),
        (["{}", "--family", "flax"], "there is no model family 'flax'"),
        (["{}", "--contact-sheet", "a.jpg"], "must end in .png"),
        (["{}", "--contact-shee", "a.png"], "No such option"),
        (["{}/nothing"], "data.path does not exist"),
    ],
)
def test_requests_that_cannot_be_met(
    folder: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    assert main(["data", "inspect", *(word.format(folder) for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_torch_stays_unloaded(folder: Path) -> None:
    code = (
        "import sys; from framework.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ','.join(n for n in ('torch', 'transformers') if n in sys.modules) or 0)"
    )
    command = [sys.executable, "-c", code, "data", "inspect", str(folder), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["samples"] == 7
