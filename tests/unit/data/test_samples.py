from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.data.samples import Sample, read_samples
from framework.errors import DataError
from framework.schema import DataConfig


def read(path: Path, on_bad_sample: str = "error") -> list[Sample]:
    return read_samples(DataConfig(path=str(path), on_bad_sample=on_bad_sample))


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(Path(str(sample.picture)).name, sample.caption) for sample in read(path)]


class TestCaptionFiles:
    def test_reads_sorted_and_recursively_past_hidden_files(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        for name in ("b.png", "sub/a.JPG", "a.webp", "sub/deep/c.d.png"):
            write_picture(name, caption=f" caption of {name}\n")
        for name in (".hidden.png", ".thumbs/x.png", "sub/.x/y.png"):
            write_picture(name)
        (tmp_path / "notes.md").write_text("not a picture")

        samples = read(tmp_path)

        names = [Path(str(s.picture)).relative_to(tmp_path).as_posix() for s in samples]
        assert names == ["a.webp", "b.png", "sub/a.JPG", "sub/deep/c.d.png"]
        assert [s.caption for s in samples] == [f"caption of {name}" for name in names]

    def test_captions_are_utf8_with_or_without_byte_order_mark(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        write_picture("a.png").with_suffix(".txt").write_bytes("\ufeffKäse 🧀\r\n".encode())
        write_picture("b.png", caption="")
        assert pairs(tmp_path) == [("a.png", "Käse 🧀"), ("b.png", "")]

    def test_folders_behind_links_are_read_once_per_way_and_circles_end(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        write_picture("set/a.png", caption="a")
        write_picture("elsewhere/b.png", caption="b")
        (tmp_path / "set/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "set/circle").symlink_to(tmp_path / "set", target_is_directory=True)
        assert pairs(tmp_path / "set") == [("a.png", "a"), ("b.png", "b")]

    def test_missing_captions_are_listed_and_counted(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        for number in range(13):
            write_picture(f"{number:02}.png", caption="x" if number == 0 else None)
        with pytest.raises(DataError, match="12 of 13 pictures have no caption") as caught:
            read(tmp_path)
        assert "01.txt" in caught.value.found
        assert "10.txt" in caught.value.found
        assert "11.txt" not in caught.value.found
        assert "and 2 more" in caught.value.found

    def test_a_caption_that_is_not_utf8_is_named(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        write_picture("a.png").with_suffix(".txt").write_bytes(b"K\xe4se")
        with pytest.raises(DataError, match=r"a\.txt: the caption is not UTF-8"):
            read(tmp_path)

    def test_a_folder_without_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("alone")
        with pytest.raises(DataError, match="no pictures in the folder"):
            read(tmp_path)


class TestPaths:
    def test_unknown_path_names_its_nearest_siblings(self, tmp_path: Path) -> None:
        (tmp_path / "pictures").mkdir()
        with pytest.raises(DataError, match=r"does not exist\n.*holds pictures\n"):
            read(tmp_path / "picture")
        with pytest.raises(DataError, match="nothing of a similar name"):
            read(tmp_path / "zzz")
        with pytest.raises(DataError, match="does not exist either"):
            read(tmp_path / "no" / "where")

    def test_a_file_of_another_kind(self, write_picture: Callable[..., Path]) -> None:
        with pytest.raises(DataError, match="neither a folder nor"):
            read(write_picture("a.png"))

    def test_two_metadata_files(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.csv").write_text("image,prompt\n")
        (tmp_path / "metadata.jsonl").write_text("")
        with pytest.raises(DataError, match=r"metadata\.csv, metadata\.jsonl"):
            read(tmp_path)

    def test_a_metadata_file_wins_over_captions(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        write_picture("a.png", caption="beside")
        (tmp_path / "metadata.csv").write_text("image,prompt\na.png,listed\n")
        assert pairs(tmp_path) == [("a.png", "listed")]


class TestCsv:
    @pytest.mark.parametrize("picture", ["image", "file_name", "path"])
    @pytest.mark.parametrize("caption", ["prompt", "text", "caption"])
    def test_every_pair_of_columns(
        self, tmp_path: Path, write_picture: Callable[..., Path], picture: str, caption: str
    ) -> None:
        write_picture("sub/a.png")
        (tmp_path / "metadata.csv").write_text(f"id,{caption},{picture}\n7,a cat,sub/a.png\n")
        assert pairs(tmp_path) == [("a.png", "a cat")]
        assert read(tmp_path)[0].picture == tmp_path / "sub/a.png"

    def test_byte_order_mark_crlf_quotes_and_blank_lines(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        for name in ("a.png", "b.png", "c.png"):
            write_picture(name)
        text = '\ufeffimage, prompt\r\na.png,"one, two"\r\n\r\nb.png,"two\r\nlines ""x"""\r\nc.png,c\r\n'
        (tmp_path / "list.csv").write_bytes(text.encode())
        samples = read(tmp_path / "list.csv")
        assert [s.caption for s in samples] == ["one, two", 'two\r\nlines "x"', "c"]
        assert [s.listed_in for s in samples] == ["list.csv:2", "list.csv:4", "list.csv:6"]

    def test_absolute_paths(self, tmp_path: Path, write_picture: Callable[..., Path]) -> None:
        picture = write_picture("there/a.png")
        (tmp_path / "here").mkdir()
        (tmp_path / "here/metadata.csv").write_text(f"image,prompt\n{picture},x\n")
        assert read(tmp_path / "here")[0].picture == picture

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("picture,prompt", r"no picture column\n.*columns picture, prompt\n.*image,prompt or"),
            ("image,description", "no caption column"),
            ("a;b", r"no picture and caption column\n  Found: columns a;b"),
            ("path,text,caption", "more than one column could be the caption: text, caption"),
            ("", "no picture and caption column"),
        ],
    )
    def test_wrong_columns(self, tmp_path: Path, header: str, message: str) -> None:
        (tmp_path / "metadata.csv").write_text(f"{header}\nx,y\n" if header else "")
        with pytest.raises(DataError, match=message) as caught:
            read(tmp_path)
        assert caught.value.where == str(tmp_path / "metadata.csv")

    def test_the_published_pair_decides_between_caption_columns(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        write_picture("a.png")
        (tmp_path / "metadata.csv").write_text("file_name,caption,text\na.png,no,yes\n")
        assert pairs(tmp_path) == [("a.png", "yes")]

    def test_all_bad_lines_in_one_report(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.csv").write_text("image,prompt\na.png,a, b\n,x\nc.png\n")
        with pytest.raises(DataError, match="3 bad lines") as caught:
            read(tmp_path)
        assert "line 2: 3 values for 2 columns" in caught.value.found
        assert "line 3: no picture in 'image'" in caught.value.found
        assert "line 4: 1 values for 2 columns" in caught.value.found

    def test_an_open_quote_is_an_error_and_swallows_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.csv").write_text('image,prompt\na.png,"open\nb.png,x\n')
        with pytest.raises(DataError, match="line 2: not CSV"):
            read(tmp_path)

    def test_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.csv").write_text("image,prompt\n")
        with pytest.raises(DataError, match="lists no pictures"):
            read(tmp_path)

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.csv").write_bytes(b"image,prompt\na.png,K\xe4se\n")
        with pytest.raises(DataError, match="not UTF-8"):
            read(tmp_path)

    def test_missing_pictures_with_line_numbers(
        self, tmp_path: Path, write_picture: Callable[..., Path]
    ) -> None:
        write_picture("0.png")
        lines = "".join(f"{number}.png,x\n" for number in range(13))
        (tmp_path / "metadata.csv").write_text("image,prompt\n" + lines)
        with pytest.raises(DataError, match="12 of 13 listed pictures do not exist") as caught:
            read(tmp_path)
        assert "1.png (metadata.csv:3)" in caught.value.found
        assert "and 2 more" in caught.value.found
        assert len(read(tmp_path, on_bad_sample="skip")) == 13


class TestJsonLines:
    def test_reads(self, tmp_path: Path, write_picture: Callable[..., Path]) -> None:
        write_picture("a.png")
        write_picture("b.png")
        lines = [
            json.dumps({"file_name": "a.png", "text": "u\u2028v", "more": 1}, ensure_ascii=False),
            "",
            json.dumps({"text": " ü ", "file_name": "b.png"}),
        ]
        (tmp_path / "metadata.jsonl").write_text(
            "\r\n".join(lines), encoding="utf-8-sig", newline=""
        )
        assert pairs(tmp_path) == [("a.png", "u\u2028v"), ("b.png", "ü")]
        assert read(tmp_path)[1].listed_in == "metadata.jsonl:3"

    def test_bad_lines_are_numbered(self, tmp_path: Path) -> None:
        lines = ['{"image": "a.png", "prompt": "x"}', "{oops", '["a"]', '{"image": "b.png"}']
        lines += ['{"image": 5, "prompt": "x"}', '{"image": "c.png", "prompt": null}']
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        with pytest.raises(DataError, match="5 bad lines") as caught:
            read(tmp_path / "x.jsonl")
        found = caught.value.found
        assert "line 2: not JSON" in found
        assert "line 3: not a JSON object" in found
        assert "line 4: no caption in 'prompt'" in found
        assert "line 5: no picture in 'image'" in found
        assert "line 6: no caption" in found

    def test_wrong_columns(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").write_text('{"img": "a.png", "prompt": "x"}\n')
        with pytest.raises(DataError, match=r"no picture column\n  Found: columns img, prompt"):
            read(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "metadata.jsonl").write_text("\n")
        with pytest.raises(DataError, match="lists no pictures"):
            read(tmp_path)


def test_a_relative_path_starts_at_the_working_folder(
    tmp_path: Path, write_picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_picture("set/a.png", caption="a")
    monkeypatch.chdir(tmp_path)
    assert pairs(Path("set")) == [("a.png", "a")]
    assert os.fspath(read(Path("set"))[0].picture).startswith("set")  # type: ignore[arg-type]


def test_a_folder_of_unlisted_tables_says_which_file_to_give(tmp_path: Path) -> None:
    (tmp_path / "train-00000.parquet").touch()
    with pytest.raises(DataError, match="no pictures in the folder") as caught:
        read(tmp_path)
    assert caught.value.hint.endswith(f"data.path={tmp_path / 'train-00000.parquet'}")
