"""Sizes that pictures are brought to, so that a batch can hold several without squeezing any.

A size is (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from framework.data.checks import CheckedSample
from framework.data.media import PICTURES, Bucket, Media, Size
from framework.errors import DataError

# Widths of landscape buckets lie about 1/16 of the square's side apart (64 px at 1024): few enough
# buckets to fill batches, close enough to crop little (a guess).
_STEPS_PER_SIDE = 16


def make_buckets(max_px: int, *, divisor_px: int, max_aspect_ratio: float) -> list[Size]:
    """List the sizes, widest last: a square, and landscape sizes with their upright twins.

    max_px: width x height stays at or below it.   divisor_px: width and height are multiples of it.
    max_aspect_ratio: longer side over shorter side stays at or below it.
    Each landscape size is as high as the budget allows.
    Raises DataError when not even a square fits.
    """
    side = math.isqrt(max_px) // divisor_px * divisor_px
    if side < divisor_px:
        raise DataError(
            f"data.max_px = {max_px} is less than one tile of {divisor_px} x {divisor_px} pixels",
            hint=f"set data.max_px to {divisor_px * divisor_px} or more",
        )
    step = max(divisor_px, side // _STEPS_PER_SIDE // divisor_px * divisor_px)
    sizes = {(side, side)}
    width = side + step
    while True:
        height = max_px // width // divisor_px * divisor_px
        if height < divisor_px or width > max_aspect_ratio * height:
            break
        sizes |= {(width, height), (height, width)}
        width += step
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def assign_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Choose the bucket that crops a picture least: the nearest aspect ratio on a log scale.

    On a tie the larger area wins.
    """
    ratio = math.log(size[0] / size[1])

    def cost(bucket: Size) -> tuple[float, int, Size]:
        return (
            round(abs(math.log(bucket[0] / bucket[1]) - ratio), 12),
            -bucket[0] * bucket[1],
            bucket,
        )

    return min(buckets, key=cost)


def bucket_of(sample: CheckedSample, *, buckets: Sequence[Size], media: Media = PICTURES) -> Bucket:
    """What samples of a batch must share; see `framework.data.media`.

    buckets: sizes from `make_buckets`. A clip that is shorter than `media.num_frames` takes the largest allowed number.
    """
    size = assign_bucket(sample.size, buckets)
    if media.kind == "video":
        return (*size, media.frames_for(sample.num_frames))
    if media.num_controls == 0:
        return size
    sizes = media.control_sizes(sample.control_sizes)
    return (*size, *(side for control in sizes for side in control))
