from __future__ import annotations

import itertools
import math

import pytest

from framework.data.buckets import assign_bucket, make_buckets
from framework.errors import DataError

BUDGETS = [
    256,
    1024,
    64 * 64,
    5000,
    128 * 128,
    256 * 256,
    512 * 512,
    1000 * 1000,
    1024 * 1024,
    2048 * 2048,
]


@pytest.mark.parametrize("max_px", BUDGETS)
@pytest.mark.parametrize("divisor_px", [8, 16])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 4.0])
def test_every_bucket_keeps_the_rules(max_px: int, divisor_px: int, ratio: float) -> None:
    buckets = make_buckets(max_px, divisor_px=divisor_px, max_aspect_ratio=ratio)
    side = math.isqrt(max_px) // divisor_px * divisor_px
    assert (side, side) in buckets
    assert len(set(buckets)) == len(buckets) <= 60
    for width, height in buckets:
        assert width * height <= max_px
        assert width % divisor_px == height % divisor_px == 0
        assert max(width, height) <= ratio * min(width, height)
        assert (height, width) in buckets
    if ratio == 1.0:
        assert buckets == [(side, side)]


def test_the_budget_is_used() -> None:
    for width, height in make_buckets(1024 * 1024, divisor_px=16, max_aspect_ratio=2.0):
        assert width * height > 0.97 * 1024 * 1024


def test_pictures_within_the_ratio_lose_little() -> None:
    buckets = make_buckets(1024 * 1024, divisor_px=16, max_aspect_ratio=2.0)
    for width, height in itertools.product(range(500, 1000, 13), repeat=2):
        bucket = assign_bucket((width, height), buckets)
        ratio, wanted = width / height, bucket[0] / bucket[1]
        assert min(ratio / wanted, wanted / ratio) > 0.9


def test_the_nearest_ratio_is_chosen() -> None:
    buckets = make_buckets(64 * 64, divisor_px=16, max_aspect_ratio=2.0)
    assert buckets == [(48, 80), (64, 64), (80, 48)]
    assert assign_bucket((700, 700), buckets) == (64, 64)
    assert assign_bucket((1600, 1000), buckets) == (80, 48)
    assert assign_bucket((10, 4000), buckets) == (48, 80)
    for size in itertools.product((3, 50, 77, 400), repeat=2):
        width, height = assign_bucket(size, buckets)
        assert assign_bucket(size[::-1], buckets) == (height, width)  # type: ignore[arg-type]


def test_the_order_of_buckets_does_not_matter() -> None:
    buckets = [(32, 32), (64, 64), (64, 32), (32, 64)]
    for order in itertools.permutations(buckets):
        assert assign_bucket((10, 10), order) == (64, 64)
        assert assign_bucket((20, 10), order) == (64, 32)


def test_a_budget_below_one_tile() -> None:
    with pytest.raises(DataError, match=r"data\.max_px = 300 is less than one tile of 32 x 32"):
        make_buckets(300, divisor_px=32, max_aspect_ratio=2.0)
