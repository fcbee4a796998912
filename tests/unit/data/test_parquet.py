from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from framework.data import ParquetCell, check_samples, read_image, read_samples
from framework.data.parquet import read_cell
from framework.data.samples import Sample
from framework.errors import DataError
from framework.schema import DataConfig


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, "PNG")
    return buffer.getvalue()


def write(file: Path, row_group_size: int | None = None, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file


def read(path: Path) -> list[Sample]:
    return read_samples(DataConfig(path=str(path)))


def color_of(sample: Sample) -> tuple[int, ...]:
    return read_image(sample).getpixel((1, 1))  # type: ignore[return-value]


def test_paths(tmp_path: Path, write_picture: Callable[..., Path]) -> None:
    write_picture("sub/a.png", color="blue")
    for column in (pa.array(["sub/a.png"]), pa.array(["sub/a.png"]).dictionary_encode()):
        write(tmp_path / "metadata.parquet", file_name=column, text=[" x "])
        (sample,) = read(tmp_path)
        assert (sample.picture, sample.caption) == (tmp_path / "sub/a.png", "x")
        assert sample.listed_in == "metadata.parquet, row 0"
        assert color_of(sample) == (0, 0, 255)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_in_several_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    colors = ["red", "lime", "blue", "white", "black"] * 3
    image = pa.array([png(color) for color in colors], kind)
    file = write(tmp_path / "a.parquet", row_group_size=2, image=image, prompt=colors)
    samples = read(file)
    assert [s.caption for s in samples] == colors
    for number in (14, 0, 7, 3, 11, 1):
        assert read_cell(samples[number].picture) == png(colors[number])  # type: ignore[arg-type]
    assert color_of(samples[2]) == (0, 0, 255)


def test_struct_with_bytes_or_path(tmp_path: Path, write_picture: Callable[..., Path]) -> None:
    write_picture("b.png", color="lime")
    image = [{"bytes": png("red"), "path": "gone.png"}, {"bytes": None, "path": "b.png"}]
    samples = read(write(tmp_path / "a.parquet", image=image, text=["r", "g"]))
    assert samples[0].picture == ParquetCell(tmp_path / "a.parquet", 0, "image")
    assert samples[1].picture == tmp_path / "b.png"
    assert [color_of(sample) for sample in samples] == [(255, 0, 0), (0, 255, 0)]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", image=[png("red")], text=["x"])
    (sample,) = read(file)
    assert color_of(sample) == (255, 0, 0)
    write(file, image=[png("blue")], text=["x"])
    assert color_of(sample) == (0, 0, 255)


def test_broken_pictures_are_named_by_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", image=[png("red"), b"nonsense"], text=["x", "y"])
    with pytest.raises(DataError, match=r"1 of 2 pictures can't be read\n.*a\.parquet, row 1: "):
        check_samples(read(file), on_bad_sample="error")


def test_rows_that_lack_something(tmp_path: Path) -> None:
    image = pa.array([png("red"), None, png("red")], pa.binary())
    file = write(tmp_path / "a.parquet", image=image, text=["x", "y", None])
    with pytest.raises(DataError, match="2 bad rows") as caught:
        read(file)
    assert "row 1: no picture in 'image'" in caught.value.found
    assert "row 2: no caption in 'text'" in caught.value.found


def test_wrong_columns_and_types(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture column\n  Found: columns pixels, text"):
        read(write(tmp_path / "a.parquet", pixels=[b""], text=["x"]))
    with pytest.raises(DataError, match=r"'image' can't hold pictures\n  Found: type int64"):
        read(write(tmp_path / "b.parquet", image=[5], text=["x"]))
    struct = [{"data": b"x"}]
    with pytest.raises(DataError, match="'image' can't hold pictures"):
        read(write(tmp_path / "c.parquet", image=struct, text=["x"]))


def test_files_that_are_not_parquet_or_empty(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(tmp_path / "a.parquet")
    file = write(
        tmp_path / "b.parquet", image=pa.array([], pa.binary()), text=pa.array([], pa.string())
    )
    with pytest.raises(DataError, match="lists no pictures"):
        read(file)


def test_missing_paths_are_named_by_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", image=["gone.png"], text=["x"])
    with pytest.raises(DataError, match=r"gone\.png \(a\.parquet, row 0\)"):
        read(file)


def test_a_cell_that_has_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet, row 3: the picture can't be read"):
        read_cell(ParquetCell(tmp_path / "a.parquet", 3, "image"))
