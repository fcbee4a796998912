from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from framework.data import check_samples, content_key, read_samples
from framework.data import checks as checks_module
from framework.data.samples import Sample
from framework.errors import DataError, RunError
from framework.schema import DataConfig


@pytest.fixture
def data(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    for number in range(5):
        write_picture(f"set/{number}.png", (10 + number, 20), caption=f"c{number}")
        age(tmp_path / f"set/{number}.png")
    return tmp_path / "set"


def age(file: Path, seconds: float = 100.0) -> None:
    """Stamps are only kept of files that haven't just been written."""
    past = time.time() - seconds
    os.utime(file, (past, past))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that the check decodes."""
    names: list[str] = []
    real = checks_module.decode_image

    def spy(content: bytes, *, name: str) -> Image.Image:
        names.append(Path(name).name)
        return real(content, name=name)

    monkeypatch.setattr(checks_module, "decode_image", spy)
    return names


def samples_of(folder: Path) -> list[Sample]:
    return read_samples(DataConfig(path=str(folder)))


def test_learns_size_and_content_in_order(data: Path) -> None:
    progress: list[tuple[int, int]] = []
    report = check_samples(
        samples_of(data), on_bad_sample="error", on_progress=lambda *counts: progress.append(counts)
    )
    assert [checked.size for checked in report.samples] == [(10 + n, 20) for n in range(5)]
    assert [checked.sample.caption for checked in report.samples] == [f"c{n}" for n in range(5)]
    assert report.samples[3].content_key == content_key((data / "3.png").read_bytes())
    assert report.skipped == ()
    assert progress == [(n, 5) for n in range(1, 6)]


def test_one_error_names_every_broken_picture(data: Path) -> None:
    (data / "1.png").write_bytes(b"nonsense")
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:50])
    with pytest.raises(DataError, match="2 of 5 pictures can't be read") as caught:
        check_samples(samples_of(data), on_bad_sample="error")
    assert "1.png: no picture format" in caught.value.found
    assert "3.png: " in caught.value.found
    assert "2.png" not in caught.value.found


def test_broken_pictures_are_skipped_and_counted(data: Path) -> None:
    (data / "1.png").write_bytes(b"nonsense")
    samples = samples_of(data)
    (data / "4.png").unlink()
    report = check_samples(samples, on_bad_sample="skip")
    assert [checked.sample.caption for checked in report.samples] == ["c0", "c2", "c3"]
    assert [bad.sample.caption for bad in report.skipped] == ["c1", "c4"]
    assert report.skipped[1].reason == "No such file or directory"


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"1 of 1 picture can't be read, so none is left\n.*empty file"
    ):
        check_samples([Sample(tmp_path / "a.png", "")], on_bad_sample="skip")


class TestStamps:
    def check(self, data: Path) -> list[str]:
        report = check_samples(
            samples_of(data), on_bad_sample="error", cache_dir=data.parent / "cache"
        )
        return [checked.content_key for checked in report.samples]

    def test_a_second_check_decodes_nothing(self, data: Path, decoded: list[str]) -> None:
        first = self.check(data)
        assert sorted(decoded) == [f"{n}.png" for n in range(5)]
        decoded.clear()
        assert self.check(data) == first
        assert decoded == []

    def test_a_relative_path_finds_the_same_stamps(
        self, data: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.check(data)
        decoded.clear()
        monkeypatch.chdir(data.parent)
        check_samples(samples_of(Path("set")), on_bad_sample="error", cache_dir=Path("cache"))
        assert decoded == []

    def test_changed_and_new_pictures_are_checked_again(
        self, data: Path, decoded: list[str]
    ) -> None:
        first = self.check(data)
        Image.new("RGB", (12, 20), "blue").save(data / "2.png")
        age(data / "2.png", 50)
        Image.new("RGB", (5, 5)).save(data / "9.png")
        (data / "9.txt").write_text("new")
        decoded.clear()
        second = self.check(data)
        assert sorted(decoded) == ["2.png", "9.png"]
        assert second[:2] == first[:2]
        assert second[2] != first[2]

    def test_a_swap_with_equal_size_and_time_is_noticed(
        self, data: Path, decoded: list[str]
    ) -> None:
        self.check(data)
        old, content = (data / "2.png").stat(), bytearray((data / "2.png").read_bytes())
        content[40] ^= 255
        (data / "2.png").write_bytes(content)
        os.utime(data / "2.png", ns=(old.st_atime_ns, old.st_mtime_ns))
        decoded.clear()
        with pytest.raises(DataError, match=r"2\.png"):
            self.check(data)
        assert decoded == ["2.png"]

    def test_a_picture_just_written_gets_no_stamp(self, data: Path, decoded: list[str]) -> None:
        age(data / "0.png", 0)
        self.check(data)
        decoded.clear()
        self.check(data)
        assert decoded == ["0.png"]

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 0, "of": ""}']
    )
    def test_damaged_stamps_are_rewritten(
        self, data: Path, decoded: list[str], content: bytes
    ) -> None:
        first = self.check(data)
        (file,) = (data.parent / "cache/checked").iterdir()
        file.write_bytes(content)
        decoded.clear()
        assert self.check(data) == first
        assert len(decoded) == 5
        decoded.clear()
        self.check(data)
        assert decoded == []

    def test_other_pictures_of_the_folder_keep_their_stamps(
        self, data: Path, decoded: list[str]
    ) -> None:
        self.check(data)
        samples = samples_of(data)
        (data / "new.png").write_bytes((data / "0.png").read_bytes())
        age(data / "new.png")
        cache = data.parent / "cache"
        check_samples([Sample(data / "new.png", "")], on_bad_sample="error", cache_dir=cache)
        decoded.clear()
        check_samples(samples, on_bad_sample="error", cache_dir=cache)
        assert decoded == []

    def test_a_broken_picture_is_named_every_time(self, data: Path) -> None:
        (data / "1.png").write_bytes(b"nonsense")
        age(data / "1.png")
        for _ in range(2):
            with pytest.raises(DataError, match=r"1 of 5 pictures can't be read"):
                self.check(data)

    def test_a_cache_that_cannot_be_written(self, data: Path) -> None:
        (data.parent / "cache").write_text("a file in the way")
        with pytest.raises(RunError, match="can't be kept"):
            self.check(data)
