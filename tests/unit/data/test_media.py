"""What samples hold beside a picture and a caption: masks, control pictures, SDXL's geometry; and clips."""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framework.data import (
    CheckedSample,
    EncodedCache,
    EncodedSource,
    ItemRequest,
    Media,
    TextRequest,
    TrainingDataset,
    build_train_loader,
    check_samples,
    collate,
    make_buckets,
    num_frames_of,
    read_samples,
    size_px_of,
)
from framework.data.batches import BatchPlan
from framework.data.clips import frames_at, read_clip_info, read_preview
from framework.data.images import build_mask, build_pixels, picture_geometry
from framework.data.places import FrameFolder
from framework.errors import DataError
from framework.schema import DataConfig

WritePicture = Callable[..., Path]
BUCKETS = make_buckets(32 * 32, divisor_px=8, max_aspect_ratio=2.0)


def half(size: tuple[int, int]) -> tuple[int, int]:
    """What a family brings control pictures to."""
    return max(1, size[0] // 2 // 8 * 8), max(1, size[1] // 2 // 8 * 8)


def checked(folder: Path, media: Media, **options: object) -> tuple[CheckedSample, ...]:
    samples = read_samples(DataConfig(path=str(folder), **options), media)  # type: ignore[arg-type]
    return check_samples(samples, on_bad_sample="error", media=media).samples


class TestGeometry:
    def test_what_the_crop_does(self) -> None:
        assert picture_geometry((100, 50), (40, 40)) == (50, 100, 0, 20, 40, 40)
        assert picture_geometry((50, 100), (40, 40)) == (100, 50, 20, 0, 40, 40)
        assert picture_geometry((40, 24), (40, 24)) == (24, 40, 0, 0, 24, 40)

    def test_it_finds_the_crop_again(self) -> None:
        """A picture whose columns count up: the first column of the crop is the one that the geometry names."""
        ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")
        pixels = build_pixels(ramp, (50, 50))
        _, _, top, left, _, _ = picture_geometry((200, 100), (50, 50))
        assert (top, left) == (0, 25)
        assert (pixels[0, 0, 0] + 1) * 127.5 == pytest.approx(2 * left, abs=2)

    def test_in_a_batch(self, tmp_path: Path, write_picture: WritePicture) -> None:
        write_picture("a.png", (60, 40), caption="a")
        dataset = TrainingDataset(checked(tmp_path, Media()), buckets=BUCKETS)
        batch = collate([dataset[ItemRequest(0, 0, 0)]] * 2)
        assert batch["geometry"].dtype == torch.int64
        assert batch["geometry"].tolist() == [[40, 60, 1, 0, 24, 40]] * 2


class TestMasks:
    @pytest.fixture
    def folder(self, tmp_path: Path, write_picture: WritePicture) -> Path:
        for name in ("a", "b"):
            write_picture(f"set/{name}.png", (60, 40), caption=name)
        values = np.zeros((20, 30), np.uint8)
        values[:, 15:] = 255
        Image.fromarray(values).save(tmp_path / "set/a.mask.png")
        return tmp_path / "set"

    def test_is_cropped_as_its_picture(self) -> None:
        rng = np.random.default_rng(0)
        grey = Image.fromarray(rng.integers(0, 256, (37, 64), dtype=np.uint8))
        for size in ((24, 24), (40, 16), (128, 128)):
            mask = build_mask(grey, size, picture_size=(64, 37))
            pixels = build_pixels(grey.convert("RGB"), size)
            assert mask.shape == (1, size[1], size[0])
            assert torch.allclose(mask * 2 - 1, pixels[:1], atol=1e-6)

    def test_in_items_and_batches(self, folder: Path) -> None:
        dataset = TrainingDataset(checked(folder, Media()), buckets=BUCKETS)
        masked, plain = dataset[ItemRequest(0, 0, 0)], dataset[ItemRequest(1, 0, 1)]
        assert "mask" not in plain
        assert masked["mask"].shape == (1, 24, 40)
        assert (masked["mask"][0, :, :18] < 0.1).all()
        assert (masked["mask"][0, :, 22:] > 0.9).all()
        batch = collate([masked, plain])
        assert torch.equal(batch["mask"][0], masked["mask"])
        assert (batch["mask"][1] == 1).all()
        assert "mask" not in collate([plain, plain])

    def test_is_there_when_latents_are_cached(self, folder: Path, tmp_path: Path) -> None:
        encoded = EncodedSource(EncodedCache(tmp_path / "cache"), latents_encoder="vae")
        dataset = TrainingDataset(checked(folder, Media()), buckets=BUCKETS, encoded=encoded)
        for index in dataset.missing_latents():
            dataset.put_latents(index, dataset.pixels(index)[:, ::8, ::8])
        item = dataset[ItemRequest(0, 0, 0)]
        assert item["mask"].shape[-2:] == tuple(8 * side for side in item["latents"].shape[-2:])

    def test_that_changed_or_has_another_shape(self, folder: Path) -> None:
        dataset = TrainingDataset(checked(folder, Media()), buckets=BUCKETS)
        Image.new("L", (40, 60)).save(folder / "a.mask.png")
        with pytest.raises(DataError, match=r"a\.mask\.png: the picture has changed"):
            dataset[ItemRequest(0, 0, 0)]
        with pytest.raises(DataError, match=r"a\.png: its mask has another shape: 40 x 60 for a"):
            checked(folder, Media())
        (folder / "a.mask.png").write_bytes(b"nonsense")
        with pytest.raises(DataError, match=r"a\.png: its mask .*a\.mask\.png: no picture format"):
            checked(folder, Media())


class TestControls:
    MEDIA = Media(num_controls=2, control_size=half)

    @pytest.fixture
    def folder(self, tmp_path: Path, write_picture: WritePicture) -> Path:
        sizes = {"c": (32, 32), "d": (33, 33), "e": (64, 32)}
        for name, size in sizes.items():
            write_picture(f"set/{name}.png", size, color=(len(name) * 9, ord(name), 0))
        lines = ["a,c", "b,d", "b,e", '"x","[""c.png"", ""e.png""]"']
        rows = [line if "[" in line else f"{line}.png" for line in lines]
        for number in range(4):
            write_picture(f"set/{number}.png", (40, 40), color=(number, 0, 0))
        table = "".join(f"{number}.png,{row}\n" for number, row in enumerate(rows))
        (tmp_path / "set/metadata.csv").write_text("image,prompt,edit_image\n" + table)
        return tmp_path / "set"

    def dataset(self, folder: Path, encoded: EncodedSource | None = None) -> TrainingDataset:
        return TrainingDataset(
            checked(folder, self.MEDIA),
            buckets=BUCKETS,
            encoded=encoded,
            media=self.MEDIA,
            caption_dropout=0.5 if encoded else 0.0,
        )

    def test_share_a_bucket_by_the_size_they_are_brought_to(self, folder: Path) -> None:
        dataset = self.dataset(folder)
        assert dataset.bucket_of == (
            (32, 32, 16, 16),
            (32, 32, 16, 16),
            (32, 32, 32, 16),
            (32, 32, 16, 16, 32, 16),
        )
        assert {size_px_of(bucket) for bucket in dataset.bucket_of} == {(32, 32)}
        assert {num_frames_of(bucket) for bucket in dataset.bucket_of} == {1}
        without = TrainingDataset(dataset.samples, buckets=BUCKETS)
        assert without.bucket_of == ((32, 32),) * 4
        assert "controls" not in without[ItemRequest(0, 0, 0)]
        assert without.control_images(0) == []

    def test_are_pictures_where_nothing_is_cached(self, folder: Path) -> None:
        dataset = self.dataset(folder)
        items = [dataset[ItemRequest(index, 0, index)] for index in range(2)]
        assert [picture.size for picture in items[1]["controls"]] == [(33, 33)]
        batch = collate(items)
        assert [[p.size for p in place] for place in batch["controls"]] == [[(32, 32), (33, 33)]]
        assert "control_images" not in batch

    def test_latents_and_captions_are_cached_with_them(self, folder: Path, tmp_path: Path) -> None:
        cache = EncodedCache(tmp_path / "cache")
        dataset = self.dataset(folder, EncodedSource(cache, "vae", "text"))
        missing = dataset.missing_controls()
        assert missing == [0, 1, 3]  # sample 2 has none that these haven't
        for index in missing:
            pictures = dataset.control_images(index)
            dataset.put_controls(index, [torch.full((1, 2, 2), float(p.width)) for p in pictures])
        assert dataset.missing_controls() == []
        requests = dataset.missing_captions()
        keys = [sample.control_keys for sample in dataset.samples]
        assert requests[:4] == [TextRequest(c, keys[i], i) for i, c in enumerate("abbx")]
        assert [request.caption for request in requests[4:]] == [""] * 4
        for request in requests:
            assert len(dataset.control_images(request.index)) == len(request.control_keys)
            dataset.put_text(request, {"embeds": torch.full((2, 3), float(request.index))})
        assert dataset.missing_captions() == []
        for index in dataset.missing_latents():
            dataset.put_latents(index, dataset.pixels(index)[:, ::8, ::8])

        items = [dataset[ItemRequest(index, 5, index)] for index in range(2)]
        batch = collate(items)
        assert [place[:, 0, 0, 0].tolist() for place in batch["controls"]] == [[32.0, 33.0]]
        assert batch["text_embeds"][:, 0, 0].tolist() == [0.0, 1.0]  # also of the empty caption
        assert "control_images" not in batch

    def test_pictures_stay_where_captions_are_encoded_in_the_step(
        self, folder: Path, tmp_path: Path
    ) -> None:
        encoded = EncodedSource(EncodedCache(tmp_path / "cache"), latents_encoder="vae")
        dataset = self.dataset(folder, encoded)
        for index in range(4):
            dataset.put_latents(index, torch.zeros(1, 4, 4))
            dataset.put_controls(index, [torch.zeros(1, 2, 2)] * len(dataset.control_images(index)))
        batch = collate([dataset[ItemRequest(3, 0, 0)]])
        assert [place.shape for place in batch["controls"]] == [(1, 1, 2, 2)] * 2
        assert [[p.size for p in place] for place in batch["control_images"]] == [
            [(32, 32)],
            [(64, 32)],
        ]

    def test_workers_can_be_given_the_set(self, folder: Path) -> None:
        dataset = self.dataset(folder)
        plan = BatchPlan(dataset.bucket_of, batch_size=2, seed=0)
        loader = build_train_loader(dataset, plan)
        assert pickle.loads(pickle.dumps(loader.dataset)).dataset.bucket_of == dataset.bucket_of
        batch = next(iter(loader))
        assert {len(place) for place in batch["controls"]} == {2}

    def test_a_broken_one_is_named_with_its_picture(self, folder: Path) -> None:
        (folder / "d.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"1\.png.*: its control picture .*d\.png: empty file"):
            checked(folder, self.MEDIA)


CLIPS = Media("video", num_frames=9, fps=10.0, frame_divisor=4)


def write_gif(
    file: Path, num_frames: int, milliseconds: int, size: tuple[int, int] = (16, 16)
) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.new("RGB", size, (n * 20, 0, 0)) for n in range(num_frames)]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return file


def write_video(file: Path, num_frames: int, fps: int, *, marked: bool = False) -> Path:
    """Frames of 32 x 16 that grow brighter, or of which the left half is bright."""
    size = (32, 16)
    av = pytest.importorskip("av")
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(file, "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(num_frames):
            values = np.full((size[1], size[0], 3), number * 12, np.uint8)
            if marked:
                values[:, :16], values[:, 16:] = 230, 20
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode())
    return file


def levels(pixels: torch.Tensor) -> list[int]:
    """The red value of each frame."""
    return [round(float(value)) for value in (pixels[0, :, 2, 2] + 1) * 127.5]


class TestClips:
    def dataset(self, folder: Path, **options: object) -> TrainingDataset:
        samples = checked(folder, CLIPS)
        return TrainingDataset(samples, buckets=[(16, 16)], media=CLIPS, **options)  # type: ignore[arg-type]

    def caption(self, folder: Path, *names: str) -> None:
        for name in names:
            (folder / f"{name}.txt").write_text(name)

    def test_every_kind_of_file(self, tmp_path: Path, write_picture: WritePicture) -> None:
        write_gif(tmp_path / "animation.gif", 9, 100)
        for number in range(6):
            write_picture(f"folder.x/{number:02}.png", (16, 16), color=(number * 30, 0, 0))
        write_picture("still.png", (16, 16), color=(50, 0, 0))
        write_video(tmp_path / "video.mp4", 20, 20)
        self.caption(tmp_path, "animation", "folder.x", "still", "video")
        dataset = self.dataset(tmp_path)
        assert [s.sample.caption for s in dataset.samples] == [
            "animation", "folder.x", "still", "video"
        ]  # fmt: skip
        assert isinstance(dataset.samples[1].sample.picture, FrameFolder)
        assert [sample.num_frames for sample in dataset.samples] == [9, 6, 1, 10]
        assert dataset.bucket_of == ((16, 16, 9), (16, 16, 5), (16, 16, 1), (16, 16, 9))
        assert [num_frames_of(bucket) for bucket in dataset.bucket_of] == [9, 5, 1, 9]
        assert levels(dataset.pixels(0)) == [n * 20 for n in range(9)]
        assert levels(dataset.pixels(1)) == [n * 30 for n in range(5)]
        assert levels(dataset.pixels(2)) == [50]
        # 20 frames a second read at 10: every other one (lossy, so nearly).
        assert levels(dataset.pixels(3)) == pytest.approx([n * 24 for n in range(9)], abs=6)
        item = dataset[ItemRequest(3, 0, 0)]
        assert item["pixels"].shape == (3, 9, 16, 16)
        assert item["geometry"].tolist() == [16, 32, 0, 8, 16, 16]
        assert collate([item, item])["pixels"].shape == (2, 3, 9, 16, 16)

    def test_a_turned_video_stands_upright(self, tmp_path: Path) -> None:
        """Phones write the sensor's frame and a matrix in the track's header; this one means 90 degrees clockwise."""
        file = write_video(tmp_path / "a.mp4", 5, 10, marked=True)
        data = bytearray(file.read_bytes())
        matrix = data.index(b"tkhd") + 44
        assert struct.unpack(">9i", data[matrix : matrix + 36])[0] == 1 << 16
        turned = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
        data[matrix : matrix + 36] = struct.pack(">9i", *turned)
        assert read_clip_info(file, bytes(data)).size == (16, 32)
        preview = np.asarray(read_preview(file, bytes(data)))
        # The bright left half of the sensor's frame is the upper half of what is seen.
        assert preview[4].min() > 180
        assert preview[28].max() < 60

    def test_slow_clips_are_filled_up_by_time(self, tmp_path: Path) -> None:
        write_gif(tmp_path / "a.gif", 2, 400)
        self.caption(tmp_path, "a")
        dataset = self.dataset(tmp_path)
        assert dataset.samples[0].num_frames == 8
        assert levels(dataset.pixels(0)) == [0, 0, 0, 0, 20]

    def test_frames_at_a_rate(self) -> None:
        assert frames_at(81, 81 / 16, 16.0) == 81
        assert frames_at(10, 1.0, 16.0) == 16
        assert frames_at(10, 1.01, 16.0) == 17
        assert frames_at(1, 0.001, 16.0) == 1
        assert frames_at(7, 0.0, 16.0) == 7

    def test_latents_are_named_by_frames_and_rate(self, tmp_path: Path) -> None:
        write_gif(tmp_path / "set/a.gif", 9, 100)
        self.caption(tmp_path / "set", "a")
        encoded = EncodedSource(EncodedCache(tmp_path / "cache"), latents_encoder="vae")
        names = set()
        for media in (
            CLIPS,
            Media("video", num_frames=5, fps=10.0, frame_divisor=4),
            Media("video", num_frames=9, fps=20.0, frame_divisor=4),
        ):
            samples = checked(tmp_path / "set", media)
            dataset = TrainingDataset(samples, buckets=[(16, 16)], media=media, encoded=encoded)
            names.add(dataset.latents_key(0))
        assert len(names) == 3

    def test_numbers_of_frames_that_the_model_cannot_take(self) -> None:
        with pytest.raises(DataError, match=r"num_frames = 80 .* multiple of 4 plus 1\n.*77 or 81"):
            Media("video", num_frames=80)

    def test_stamps_of_a_clip_and_of_its_first_frame_are_apart(self, tmp_path: Path) -> None:
        file = write_gif(tmp_path / "set/a.gif", 9, 100)
        self.caption(tmp_path / "set", "a")
        os.utime(file, (1e9, 1e9))
        for media, frames in ((Media(), 1), (CLIPS, 9), (Media(), 1), (CLIPS, 9)):
            found = read_samples(DataConfig(path=str(tmp_path / "set")), media)
            report = check_samples(
                found, on_bad_sample="error", media=media, cache_dir=tmp_path / "cache"
            )
            assert report.samples[0].num_frames == frames

    def test_a_changed_frame_is_noticed(self, tmp_path: Path, write_picture: WritePicture) -> None:
        for number in range(2):
            write_picture(f"a/{number}.png", (16, 16))
        self.caption(tmp_path, "a")
        dataset = self.dataset(tmp_path)
        write_picture("a/1.png", (16, 16), color="blue")
        with pytest.raises(DataError, match="has changed since it was checked"):
            dataset.pixels(0)

    def test_broken_clips_are_named(self, tmp_path: Path, write_picture: WritePicture) -> None:
        data = write_video(tmp_path / "a.mp4", 20, 20).read_bytes()
        (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
        (tmp_path / "b.mp4").write_bytes(b"nonsense")
        write_picture("c/0.png", (16, 16))
        write_picture("c/1.png", (8, 16))
        self.caption(tmp_path, "a", "b", "c")
        with pytest.raises(DataError, match="3 of 3 pictures can't be read") as caught:
            checked(tmp_path, CLIPS)
        assert "8 x 16, 16 x 16" in caught.value.found

    def test_pictures_alone_pass_videos_over(
        self, tmp_path: Path, write_picture: WritePicture
    ) -> None:
        write_picture("a.png", caption="a")
        (tmp_path / "b.mp4").write_bytes(b"")
        self.caption(tmp_path, "b")
        assert [sample.caption for sample in read_samples(DataConfig(path=str(tmp_path)))] == ["a"]

    def test_columns_of_metadata(self, tmp_path: Path, write_picture: WritePicture) -> None:
        write_gif(tmp_path / "a.gif", 5, 100)
        for number in range(5):
            write_picture(f"frames/{number}.png", (16, 16))
        write_picture("p.png", (16, 16))
        (tmp_path / "metadata.csv").write_text(
            "image,video,prompt\np.png,a.gif,x\np.png,frames,y\n"
        )
        assert [s.num_frames for s in checked(tmp_path, CLIPS)] == [5, 5]
        assert [s.num_frames for s in checked(tmp_path, Media())] == [1, 1]

    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(DataError, match=r"needs the library `av`\n.*octavo\[video\]"):
            read_clip_info(tmp_path / "a.mp4", b"")
