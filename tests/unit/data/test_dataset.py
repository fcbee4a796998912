from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from framework.data import (
    BatchPlan,
    EncodedCache,
    EncodedSource,
    ItemRequest,
    TextRequest,
    TrainingDataset,
    build_train_loader,
    build_validation_loader,
    check_samples,
    collate,
    make_buckets,
    pad_text,
    read_samples,
    same_size_groups,
)
from framework.data.checks import CheckedSample
from framework.errors import DataError
from framework.schema import DataConfig

BUCKETS = make_buckets(32 * 32, divisor_px=8, max_aspect_ratio=2.0)
SIZES = [(40, 40), (40, 40), (60, 40), (40, 60), (33, 32), (62, 40), (40, 41)]


@pytest.fixture
def samples(tmp_path: Path, write_picture: Callable[..., Path]) -> tuple[CheckedSample, ...]:
    for number, size in enumerate(SIZES):
        color = (number * 30, 0, 0)
        write_picture(f"set/{number}.png", size, color=color, caption=f"caption {number % 4}")
    found = read_samples(DataConfig(path=str(tmp_path / "set")))
    return check_samples(found, on_bad_sample="error").samples


def fill(dataset: TrainingDataset) -> None:
    """Stand in for the encoders: latents are the pixels, a caption of n characters has n tokens."""
    for index in dataset.missing_latents():
        dataset.put_latents(index, dataset.pixels(index)[:, ::8, ::8].bfloat16())
    for request in dataset.missing_captions():
        length = max(1, len(request.caption))
        embeds = torch.full((length, 6), float(length), dtype=torch.bfloat16)
        dataset.put_text(request, {"embeds": embeds, "pooled": torch.full((2,), float(length))})


@pytest.fixture
def encoded(tmp_path: Path) -> EncodedSource:
    return EncodedSource(EncodedCache(tmp_path / "cache"), "vae", "text encoder")


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    return left == right


class TestItems:
    def test_pixels_and_caption(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        assert len(dataset) == 7
        item = dataset[ItemRequest(2, 5, 3)]
        assert sorted(item) == [
            "caption", "geometry", "index", "key", "micro_step", "pixels", "position"
        ]  # fmt: skip
        assert (item["index"], item["micro_step"], item["position"]) == (2, 5, 3)
        assert (item["caption"], item["key"]) == ("caption 2", samples[2].content_key)
        assert dataset.bucket_of[2] == (40, 24)
        assert item["pixels"].shape == (3, 24, 40)
        assert item["pixels"][0] == pytest.approx(60 / 127.5 - 1)
        assert (item["pixels"][1:] == -1).all()

    def test_a_turned_picture_goes_to_the_upright_bucket(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
        (tmp_path / "a.txt").write_text("x")
        found = read_samples(DataConfig(path=str(tmp_path)))
        checked = check_samples(found, on_bad_sample="error").samples
        dataset = TrainingDataset(checked, buckets=BUCKETS)
        assert dataset.bucket_of == ((24, 40),)
        assert dataset.pixels(0).shape == (3, 40, 24)

    def test_encoded(self, samples: tuple[CheckedSample, ...], encoded: EncodedSource) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=encoded)
        fill(dataset)
        item = dataset[ItemRequest(2, 5, 3)]
        assert sorted(item) == [
            "geometry", "index", "key", "latents", "micro_step", "position", "text"
        ]  # fmt: skip
        assert item["latents"].shape == (3, 3, 5)
        assert item["latents"].dtype == item["text"]["embeds"].dtype == torch.bfloat16
        assert item["text"]["embeds"].shape == (9, 6)
        assert item["text"]["pooled"].tolist() == [9.0, 9.0]

    def test_only_one_of_the_two_is_encoded(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        for source, keys in (
            (EncodedSource(encoded.cache, latents_encoder="vae"), {"latents", "caption"}),
            (EncodedSource(encoded.cache, text_encoder="text encoder"), {"pixels", "text"}),
        ):
            dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=source)
            assert bool(dataset.missing_latents()) == ("latents" in keys)
            assert bool(dataset.missing_captions()) == ("text" in keys)
            fill(dataset)
            assert keys < dataset[ItemRequest(0, 0, 0)].keys()

    def test_a_picture_that_changed_after_the_check(
        self, samples: tuple[CheckedSample, ...], write_picture: Callable[..., Path]
    ) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        write_picture("set/2.png", (60, 40), color="blue")
        with pytest.raises(DataError, match=r"2\.png: the picture has changed"):
            dataset[ItemRequest(2, 0, 0)]

    def test_an_entry_that_has_gone(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=encoded)
        fill(dataset)
        encoded.cache.path("latents", dataset.latents_key(1)).unlink()
        with pytest.raises(DataError, match=r"cached latents of .*1\.png are gone or damaged"):
            dataset[ItemRequest(1, 0, 0)]


class TestMissing:
    def test_each_picture_and_caption_once(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        dataset = TrainingDataset((*samples, samples[0]), buckets=BUCKETS, encoded=encoded)
        missing = dataset.missing_latents()
        assert sorted(missing) == list(range(7))
        assert [dataset.bucket_of[index] for index in missing] == sorted(dataset.bucket_of[:7])
        assert dataset.missing_captions() == [TextRequest(f"caption {n}", (), n) for n in range(4)]
        fill(dataset)
        assert dataset.missing_latents() == []
        assert dataset.missing_captions() == []
        assert equal(
            dataset[ItemRequest(0, 0, 0)]["latents"], dataset[ItemRequest(7, 0, 0)]["latents"]
        )

    def test_dropout_needs_the_empty_caption(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=encoded, caption_dropout=0.1)
        assert dataset.missing_captions()[-1] == TextRequest("", (), 0)

    def test_nothing_is_missing_without_a_cache(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        assert (dataset.missing_latents(), dataset.missing_captions()) == ([], [])

    def test_another_encoder_or_size_needs_its_own(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        fill(TrainingDataset(samples, buckets=BUCKETS, encoded=encoded))
        other = EncodedSource(encoded.cache, "vae 2", "text encoder 2")
        dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=other)
        assert len(dataset.missing_latents()) == 7
        assert len(dataset.missing_captions()) == 4
        smaller = TrainingDataset(samples, buckets=[(16, 16)], encoded=encoded)
        assert len(smaller.missing_latents()) == 7
        assert smaller.missing_captions() == []

    def test_groups_share_a_size(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        groups = same_size_groups(dataset, range(7), group_size=3)
        assert sorted(index for group in groups for index in group) == list(range(7))
        assert all(len(group) <= 3 for group in groups)
        assert all(len({dataset.bucket_of[index] for index in group}) == 1 for group in groups)
        assert sorted(map(len, groups)) == [1, 1, 2, 3]


class TestDropout:
    def drops(self, dataset: TrainingDataset, steps: range, positions: int = 10) -> list[bool]:
        return [
            dataset[ItemRequest(0, step, position)]["text"]["embeds"].shape[0] == 1
            for step in steps
            for position in range(positions)
        ]

    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
    def test_rate(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource, rate: float
    ) -> None:
        dataset = TrainingDataset(
            samples, buckets=BUCKETS, encoded=encoded, caption_dropout=rate, seed=3
        )
        fill(dataset)
        drops = self.drops(dataset, range(200))
        assert sum(drops) / len(drops) == pytest.approx(rate, abs=0.03)
        if rate in (0.0, 1.0):
            assert len(set(drops)) == 1

    def test_depends_on_seed_step_and_position_alone(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        def build(seed: int) -> TrainingDataset:
            return TrainingDataset(
                samples, buckets=BUCKETS, encoded=encoded, caption_dropout=0.5, seed=seed
            )

        fill(build(1))
        whole = self.drops(build(1), range(20))
        assert self.drops(build(1), range(10, 20)) == whole[100:]
        assert self.drops(build(2), range(20)) != whole


class TestCollate:
    def test_pads_text_on_the_right(self) -> None:
        texts = [torch.ones(2, 3, dtype=torch.bfloat16), torch.full((4, 3), 2.0).bfloat16()]
        embeds, mask = pad_text(texts)
        assert embeds.dtype == torch.bfloat16
        assert embeds.shape == (2, 4, 3)
        assert embeds[0, :, 0].tolist() == [1, 1, 0, 0]
        assert mask.tolist() == [[True, True, False, False], [True] * 4]

    def test_batch_of_encoded_samples(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=encoded)
        fill(dataset)
        batch = collate([dataset[ItemRequest(0, 9, 4)], dataset[ItemRequest(4, 9, 5)]])
        assert batch["latents"].shape == (2, 3, 4, 4)
        assert batch["text_embeds"].shape == (2, 9, 6)
        assert batch["text_mask"].all()
        assert batch["text_pooled"].tolist() == [[9.0, 9.0]] * 2
        assert batch["geometry"].shape == (2, 6)
        assert not {"mask", "controls", "control_images"} & batch.keys()
        assert batch["indices"].tolist() == [0, 4]
        assert batch["positions"].tolist() == [4, 5]
        assert batch["keys"] == [samples[0].content_key, samples[4].content_key]
        assert batch["micro_step"] == 9
        assert "pixels" not in batch
        assert "captions" not in batch

    def test_batch_of_pixels(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        batch = collate([dataset[ItemRequest(0, 0, 0)], dataset[ItemRequest(1, 0, 1)]])
        assert batch["pixels"].shape == (2, 3, 32, 32)
        assert batch["captions"] == ["caption 0", "caption 1"]


class TestLoaders:
    def batches(self, dataset: TrainingDataset, count: int, **options: int) -> list[dict[str, Any]]:
        plan = BatchPlan(dataset.bucket_of, batch_size=2, world_size=2, seed=11)
        loader = build_train_loader(dataset, plan, **options)
        iterator = iter(loader)
        found = list(islice(iterator, count))
        del iterator, loader
        return found

    def test_workers_and_resume_change_nothing(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        for source in (None, encoded):
            dataset = TrainingDataset(
                samples, buckets=BUCKETS, encoded=source, caption_dropout=0.4, seed=11
            )
            fill(dataset) if source is not None else None
            whole = self.batches(dataset, 14)
            assert [batch["micro_step"] for batch in whole] == list(range(14))
            assert equal_lists(self.batches(dataset, 14, num_workers=2), whole)
            assert equal_lists(self.batches(dataset, 9, start=5), whole[5:])
            if source is not None:
                assert equal_lists(self.batches(dataset, 9, start=5, num_workers=1), whole[5:])

    def test_ranks_read_their_own_part(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        for first, second in zip(
            self.batches(dataset, 8, rank=0), self.batches(dataset, 8, rank=1), strict=True
        ):
            assert first["positions"].tolist() == [0, 1]
            assert second["positions"].tolist() == [2, 3]

    def test_the_global_generator_is_left_alone(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        self.batches(dataset, 3)
        self.batches(dataset, 3, num_workers=1)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_error_in_a_worker_arrives_whole_and_ends_the_workers(
        self, samples: tuple[CheckedSample, ...], tmp_path: Path, num_workers: int
    ) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        for file in (tmp_path / "set").glob("*.png"):
            file.unlink()
        with pytest.raises(DataError, match=r"^\S+\.png: the picture can't be read\n.*$") as caught:
            self.batches(dataset, 1, num_workers=num_workers)
        assert caught.value.found == "No such file or directory"
        assert not multiprocessing.active_children()

    def test_a_dataset_can_be_sent_to_spawned_workers(
        self, samples: tuple[CheckedSample, ...], encoded: EncodedSource
    ) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS, encoded=encoded, caption_dropout=0.5)
        fill(dataset)
        plan = BatchPlan(dataset.bucket_of, batch_size=1, seed=0)
        loader = build_train_loader(dataset, plan)
        copy = pickle.loads(pickle.dumps(loader.dataset))
        assert equal(copy[ItemRequest(3, 1, 0)], dataset[ItemRequest(3, 1, 0)])

    def test_validation_sees_every_sample_once(self, samples: tuple[CheckedSample, ...]) -> None:
        dataset = TrainingDataset(samples, buckets=BUCKETS)
        indices = [
            index
            for rank in range(2)
            for batch in build_validation_loader(dataset, batch_size=2, world_size=2, rank=rank)
            for index in batch["indices"].tolist()
        ]
        assert sorted(indices) == list(range(7))


def equal_lists(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(map(equal, left, right))
