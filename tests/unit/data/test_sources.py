"""The layouts in which people have their pictures, beside those of test_samples.py and test_parquet.py."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from framework.data import (
    BatchPlan,
    Media,
    check_samples,
    read_image,
    read_samples,
    resolve_repeats,
)
from framework.data.folders import read_folder
from framework.data.sample import Sample
from framework.errors import DataError
from framework.schema import DataConfig
from framework.schema.data_paths import expand_pattern

EDITING = Media(num_controls=2)
WritePicture = Callable[..., Path]


def png(color: str = "red", size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def read(path: object, media: Media | None = None, **options: Any) -> list[Sample]:
    return read_samples(DataConfig(path=str(path), **options), media or Media())


def red_green_blue(sample: Sample) -> tuple[int, ...]:
    return read_image(sample).getpixel((1, 1))  # type: ignore[return-value]


class TestTables:
    def test_json_list(self, tmp_path: Path, write_picture: WritePicture) -> None:
        write_picture("sub/a.png")
        rows = [{"image": "sub/a.png", "prompt": " x ", "seed": 1}]
        (tmp_path / "metadata.json").write_text(json.dumps(rows))
        (sample,) = read(tmp_path)
        assert (sample.picture, sample.caption) == (tmp_path / "sub/a.png", "x")
        assert sample.listed_in == "metadata.json, row 0"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"a.png": "x"}', r"not a list of rows\n  Found: a JSON object"),
            ("[", "not JSON"),
            ('[{"image": "a.png", "prompt": "x"}, 5]', "1 bad line\n.*row 1: not a JSON object"),
            ("[]", "lists no pictures"),
        ],
    )
    def test_bad_json(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "metadata.json").write_text(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path)

    def test_paths_may_start_at_another_folder(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        write_picture("pictures/a.png")
        (tmp_path / "list.csv").write_text("image,prompt\na.png,x\n")
        (sample,) = read(tmp_path / "list.csv", base_dir=str(tmp_path / "pictures"))
        assert sample.picture == tmp_path / "pictures/a.png"

    @pytest.mark.parametrize("form", ["csv", "json", "jsonl", "parquet"])
    def test_masks_and_control_pictures(
        self, tmp_path: Path, write_picture: WritePicture, form: str
    ) -> None:
        for name in ("a.png", "b.png", "m.png", "c0.png", "c1.png"):
            write_picture(name)
        controls: list[Any] = [["c0.png", "c1.png"], ["c1.png"]]
        file = tmp_path / f"metadata.{form}"
        rows = [
            {"image": "a.png", "prompt": "x", "mask": "m.png", "edit_image": controls[0]},
            {"image": "b.png", "prompt": "y", "mask": "", "edit_image": controls[1]},
        ]
        if form == "csv":
            file.write_text(
                "image,prompt,mask,edit_image\n"
                'a.png,x,m.png,"[""c0.png"", ""c1.png""]"\nb.png,y,,c1.png\n'
            )
        elif form == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), file)
        elif form == "json":
            file.write_text(json.dumps(rows))
        else:
            file.write_text("\n".join(json.dumps(row) for row in rows))
        first, second = read(tmp_path, EDITING)
        assert first.mask == tmp_path / "m.png"
        assert second.mask is None
        assert first.controls == (tmp_path / "c0.png", tmp_path / "c1.png")
        assert second.controls == (tmp_path / "c1.png",)
        assert read(tmp_path)[0].controls == ()

    def test_pictures_in_parquet_lists(self, tmp_path: Path) -> None:
        rows = {
            "image": [{"bytes": png("red"), "path": None}],
            "text": ["x"],
            "edit_image": [[{"bytes": png("lime")}, {"bytes": png("blue")}]],
        }
        parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
        (sample,) = read(tmp_path / "a.parquet", EDITING)
        report = check_samples([sample], on_bad_sample="error", media=EDITING)
        assert len(set(report.samples[0].control_keys)) == 2
        colors = [red_green_blue(Sample(place, "")) for place in sample.controls]
        assert colors == [(0, 255, 0), (0, 0, 255)]

    def test_control_pictures_that_the_model_needs(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        write_picture("a.png")
        (tmp_path / "metadata.csv").write_text(
            'image,prompt,edit_image\na.png,x,\na.png,y,"[""a.png"", ""a.png"", ""a.png""]"\n'
        )
        with pytest.raises(DataError, match="2 of 2 pictures don't have 1 to 2 control pictures"):
            read(tmp_path, EDITING)

    @pytest.mark.parametrize(
        ("cell", "message"),
        [('"[a.png"', "'edit_image' is no JSON list"), ('"[5]"', "no path in 'edit_image'")],
    )
    def test_cells_that_hold_no_paths(self, tmp_path: Path, cell: str, message: str) -> None:
        (tmp_path / "metadata.csv").write_text(f"image,prompt,edit_image\na.png,x,{cell}\n")
        with pytest.raises(DataError, match=f"1 bad line\n.*line 2: {message}"):
            read(tmp_path, EDITING)

    def test_a_mask_that_is_listed_but_missing(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        write_picture("a.png")
        (tmp_path / "metadata.csv").write_text("image,prompt,mask\na.png,x,m.png\n")
        with pytest.raises(DataError, match=r"1 of 1 listed pictures .*\n.*m\.png \(for .*a\.png"):
            read(tmp_path)


class TestFolders:
    def test_repeats_and_captions_in_the_names_of_folders(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        write_picture("10_sks cat/a.png")
        write_picture("10_sks cat/b.png", caption="b")
        write_picture("3_dog/sub/c.png").with_suffix(".caption").write_text("c")
        write_picture("2024_summer/d.png", caption="d")
        write_picture("e.png", caption="e")
        found = {s.caption: s.repeats for s in read(tmp_path)}
        assert found == {"sks cat": 10, "b": 10, "c": 3, "d": 1, "e": 1}

    def test_a_txt_file_wins_over_a_caption_file(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        write_picture("a.png", caption="txt").with_suffix(".caption").write_text("other")
        assert [s.caption for s in read(tmp_path)] == ["txt"]

    def test_masks_and_control_pictures_beside(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        for name in ("a.jpg", "b.webp", "alone.mask.png"):
            write_picture(name, caption=name)
        others = ("a.mask.png", "b-masklabel.png", "a.control_2.png", "a.control_1.jpg")
        for name in (*others, "b.control.png"):
            write_picture(name)
        a, alone, b = read_folder(tmp_path, EDITING).samples
        assert a.mask == tmp_path / "a.mask.png"
        assert a.controls == (tmp_path / "a.control_1.jpg", tmp_path / "a.control_2.png")
        assert b.mask == tmp_path / "b-masklabel.png"
        assert b.controls == (tmp_path / "b.control.png",)
        assert alone.picture == tmp_path / "alone.mask.png"


def write_shard(file: Path, **members: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


class TestShards:
    def test_samples_of_one_base_name(self, tmp_path: Path) -> None:
        members = {
            "x/0.png": png("red"),
            "x/0.txt": " red \n",
            "x/1.json": json.dumps({"text": "green", "key": 1}),
            "x/1.png": png("lime"),
            "x/1.mask.png": png("white"),
            "x/1.edit_image_1.png": png("blue"),
            "x/1.edit_image_0.png": png("red"),
            "x/.hidden.png": png(),
            "README": "nothing",
        }
        write_shard(tmp_path / "a.tar", **members)
        media = Media()
        first, second = read(tmp_path / "a.tar", media)
        assert [first.caption, second.caption] == ["red", "green"]
        assert (first.mask, first.controls, second.controls) == (None, (), ())
        assert str(second.mask) == f"{tmp_path / 'a.tar'}, x/1.mask.png"
        assert red_green_blue(second) == (0, 255, 0)
        assert red_green_blue(first) == (255, 0, 0)
        with pytest.raises(DataError, match="1 of 2 pictures don't have 1 to 2 control pictures"):
            read(tmp_path / "a.tar", EDITING)

    def test_a_folder_and_a_pattern_of_shards(self, tmp_path: Path) -> None:
        for number in range(3):
            write_shard(
                tmp_path / f"s/{number:03}.tar",
                **{f"{number}.png": png(), f"{number}.txt": str(number)},
            )
        for path in (
            tmp_path / "s",
            tmp_path / "s/{000..002}.tar",
            f"{tmp_path}/s/00{{0,1,2}}.tar",
        ):
            assert [sample.caption for sample in read(path)] == ["0", "1", "2"]
        with pytest.raises(DataError, match=r"2 of 5 shards do not exist\n.*003\.tar, .*004\.tar"):
            read(tmp_path / "s/{000..004}.tar")
        with pytest.raises(DataError, match=r"data\.path does not exist"):
            read(tmp_path / "s/9.tar")

    def test_patterns(self) -> None:
        assert expand_pattern("a{8..10}b") == ["a8b", "a9b", "a10b"]
        assert expand_pattern("{01..02}/{x,y}") == ["01/x", "01/y", "02/x", "02/y"]
        assert expand_pattern("plain") == ["plain"]

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_bytes(b"not a tar archive at all" * 100)
        with pytest.raises(DataError, match="not a readable tar archive"):
            read(tmp_path / "a.tar")
        write_shard(tmp_path / "b.tar", **{"0.png": png()})
        with pytest.raises(DataError, match=r"1 of 1 pictures have no caption\n.*b\.tar, 0\.png"):
            read(tmp_path / "b.tar")
        write_shard(tmp_path / "c.tar", **{"0.txt": "alone"})
        with pytest.raises(DataError, match="no pictures in the shards"):
            read(tmp_path / "c.tar")

    def test_a_shard_that_was_cut(self, tmp_path: Path) -> None:
        file = write_shard(tmp_path / "a.tar", **{"0.txt": "x", "0.png": png(size=(90, 90))})
        (sample,) = read(file)
        file.write_bytes(file.read_bytes()[:1600])
        with pytest.raises(DataError, match=r"a\.tar, 0\.png: the shard is cut short"):
            read_image(sample)


class TestHub:
    def test_rows_of_a_data_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        features = datasets.Features(
            image=datasets.Image(),
            text=datasets.Value("string"),
            edit_image=datasets.List(datasets.Image()),
        )
        colors = ["red", "lime", "blue"]
        rows = {
            "image": [{"bytes": png(color), "path": None} for color in colors],
            "text": colors,
            "edit_image": [[{"bytes": png("white"), "path": None}]] * 3,
        }
        (tmp_path / "set").mkdir()
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "set/train.parquet")
        path = f"hub://{tmp_path / 'set'}:train"
        samples = read(path, EDITING)
        assert [sample.caption for sample in samples] == colors
        assert red_green_blue(samples[2]) == (0, 0, 255)
        assert red_green_blue(Sample(samples[1].controls[0], "")) == (255, 255, 255)
        cache = tmp_path / "stamps"
        for _ in range(2):
            report = check_samples(samples, on_bad_sample="error", cache_dir=cache, media=EDITING)
            assert [checked.size for checked in report.samples] == [(4, 3)] * 3
        assert any((cache / "checked").iterdir())
        with pytest.raises(DataError, match="the data set can't be loaded"):
            read(f"hub://{tmp_path / 'set'}:nothing")

    def test_a_name_that_is_none(self) -> None:
        with pytest.raises(DataError, match="not the name of a hub data set"):
            read("hub://")


class TestSeveralSources:
    def config(self, tmp_path: Path, *sources: dict[str, Any], **options: Any) -> DataConfig:
        named = [{**source, "path": str(tmp_path / source["path"])} for source in sources]
        return DataConfig.model_validate({"sources": named, **options})

    @pytest.fixture
    def folder(self, tmp_path: Path, write_picture: WritePicture) -> Path:
        for number in range(6):
            write_picture(f"a/{number}.png", caption=f"a{number}")
        for number in range(2):
            write_picture(f"b/5_x/{number}.png", caption=f"b{number}")
        return tmp_path

    def test_order_and_repeats(self, folder: Path) -> None:
        config = self.config(folder, {"path": "a"}, {"path": "b", "repeats": 2}, repeats=3)
        samples = read_samples(config)
        assert [s.source for s in samples] == [0] * 6 + [1] * 2
        assert resolve_repeats(samples, config) == (3.0,) * 6 + (30.0,) * 2
        assert resolve_repeats(samples[:6], config) == 3
        assert resolve_repeats([], config) == 3

    def test_weights_are_shares_of_an_epoch_of_the_same_length(self, folder: Path) -> None:
        config = self.config(folder, {"path": "a", "weight": 1}, {"path": "b", "weight": 3})
        samples = read_samples(config)
        repeats = resolve_repeats(samples, config)
        assert isinstance(repeats, tuple)
        assert sum(repeats) == pytest.approx(6 + 10)
        assert sum(repeats[6:]) == pytest.approx(12)
        plan = BatchPlan([(8, 8)] * 8, batch_size=2, seed=0, repeats=repeats)
        steps = range(plan.num_steps_before(200))
        seen = Counter(samples[index].source for step in steps for index in plan.global_batch(step))
        assert seen[1] / seen.total() == pytest.approx(0.75, abs=0.005)

    def test_a_source_of_which_nothing_is_left(self, folder: Path) -> None:
        config = self.config(folder, {"path": "a", "weight": 1}, {"path": "b", "weight": 3})
        assert resolve_repeats(read_samples(config)[:6], config) == (1.0,) * 6

    def test_one_path_is_one_source(self, folder: Path) -> None:
        samples = read(folder / "a", repeats=4)
        assert resolve_repeats(samples, DataConfig(path=str(folder / "a"), repeats=4)) == 4
