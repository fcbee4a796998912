"""Every picture is decoded once before training, so that a broken one is named at the start and not hours later.

The same holds for masks, control pictures and clips.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from framework.data.clips import clip_key, frames_at, read_clip_info
from framework.data.images import content_key, decode_image
from framework.data.listing import count_of, list_first
from framework.data.media import PICTURES, Media, Size
from framework.data.places import Place, is_clip, read_place_bytes
from framework.data.sample import Sample
from framework.data.stamps import Stamp, StampBook, read_file_state
from framework.errors import DataError, RunError

_NUM_NAMED = 50  # broken pictures written out in the error
_MAX_THREADS = 8  # Pillow decodes without Python's lock; a guess
_RATIO_SLACK_PX = 1.0  # a mask scaled down by itself may be off by the rounding of one side


@dataclass(frozen=True)
class CheckedSample:
    """A sample whose picture decodes.

    content_key: sha256 of the encoded picture.   size: (width, height) in pixels as the picture is seen.
    mask_key: content of its mask, "" without one.
    control_keys, control_sizes: of its control pictures.
    num_frames: what a clip gives at the wanted rate, before it is cut; 1 for a picture.
    """

    sample: Sample
    content_key: str
    size: Size
    mask_key: str = ""
    control_keys: tuple[str, ...] = ()
    control_sizes: tuple[Size, ...] = ()
    num_frames: int = 1


@dataclass(frozen=True)
class BadSample:
    """A sample that is left out, and why."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """What can be trained on, in the order of the data set, and what was skipped."""

    samples: tuple[CheckedSample, ...]
    skipped: tuple[BadSample, ...]


def check_samples(
    samples: Sequence[Sample],
    *,
    on_bad_sample: Literal["error", "skip"],
    media: Media = PICTURES,
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every picture and learn its size and content; fast for pictures that were checked before.

    media: whether files with several frames are read as clips, and at what rate.
    cache_dir: results are kept in `checked/` below it and trusted while a file's size and times stay the same.
    on_progress: called with (done, total) now and then, from the calling thread.
    Raises DataError that names the broken pictures (with `on_bad_sample: error`), or when none is left.
    """
    book = StampBook(cache_dir / "checked" if cache_dir is not None else None)
    good: list[CheckedSample] = []
    bad: list[BadSample] = []
    for done, (sample, stamps) in enumerate(_check_all(samples, book, media), start=1):
        result = _judge(sample, stamps, media)
        if isinstance(result, CheckedSample):
            good.append(result)
        else:
            bad.append(BadSample(sample, result))
        if on_progress is not None:
            on_progress(done, len(samples))
    try:
        book.write()
    except OSError as error:
        raise RunError(
            "the results of the picture check can't be kept",
            where=str(cache_dir),
            found=str(error),
            hint="set data.cache_dir to a folder that can be written",
        ) from error
    if bad and (on_bad_sample == "error" or not good):
        raise _broken_pictures(bad, len(samples))
    return CheckReport(tuple(good), tuple(bad))


_Results = dict[Place, Stamp | str]  # what was learnt of a file, or what is wrong with it


def _check_all(
    samples: Sequence[Sample], book: StampBook, media: Media
) -> Iterator[tuple[Sample, _Results]]:
    """Yield each sample in order with the results of its files; a file of several samples is read once."""
    clips = {s.picture for s in samples if media.kind == "video" and is_clip(s.picture)}
    results: _Results = {}
    new: list[Place] = []
    for place in dict.fromkeys(place for sample in samples for place in sample.places):
        stamp = book.find(place, as_clip=place in clips)
        if stamp is not None:
            results[place] = stamp
        else:
            new.append(place)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        found = zip(new, pool.map(lambda place: _check(place, place in clips), new), strict=True)
        for sample in samples:
            while any(place not in results for place in sample.places):
                place, result = next(found)
                results[place] = result
                if isinstance(result, Stamp):
                    book.add(place, result, as_clip=place in clips)
            yield sample, {place: results[place] for place in sample.places}


def _check(place: Place, as_clip: bool) -> Stamp | str:
    state = read_file_state(place) or (
        0,
        0,
        0,
    )  # before reading: a change in between must not look checked
    try:
        data = read_place_bytes(place)
        if as_clip:
            info = read_clip_info(place, data)
            return Stamp(*state, *info.size, clip_key(place, data), info.num_frames, info.seconds)
        return Stamp(*state, *decode_image(data, name=str(place)).size, content_key(data))
    except DataError as error:
        return error.found or error.message


def _judge(sample: Sample, results: _Results, media: Media) -> CheckedSample | str:
    """The checked sample, or why it can't be used."""
    stamps: dict[Place, Stamp] = {}
    for place, result in results.items():
        if isinstance(result, Stamp):
            stamps[place] = result
        elif place == sample.picture:
            return result
        else:
            return f"its {'mask' if place == sample.mask else 'control picture'} {place}: {result}"
    picture = stamps[sample.picture]
    size = (picture.width_px, picture.height_px)
    mask = stamps[sample.mask] if sample.mask is not None else None
    if mask is not None and not _same_ratio(size, (mask.width_px, mask.height_px)):
        return (
            f"its mask has another shape: {mask.width_px} x {mask.height_px} for a picture of"
            f" {size[0]} x {size[1]}"
        )
    controls = [stamps[place] for place in sample.controls]
    return CheckedSample(
        sample,
        picture.content_key,
        size,
        mask_key=mask.content_key if mask is not None else "",
        control_keys=tuple(control.content_key for control in controls),
        control_sizes=tuple((control.width_px, control.height_px) for control in controls),
        num_frames=frames_at(picture.num_frames, picture.seconds, media.fps),
    )


def _same_ratio(size: Size, other: Size) -> bool:
    scale = size[0] / other[0]
    slack = _RATIO_SLACK_PX * max(1.0, scale)
    return abs(other[1] * scale - size[1]) <= slack


def _broken_pictures(bad: Sequence[BadSample], total: int) -> DataError:
    lines = [f"{entry.sample.name}: {entry.reason}" for entry in bad]
    nothing_left = len(bad) == total
    return DataError(
        f"{len(bad)} of {count_of(total, 'picture')} can't be read"
        + (", so none is left" if nothing_left else ""),
        found=list_first(lines, separator="\n    ", limit=_NUM_NAMED),
        hint="replace or remove them"
        + ("" if nothing_left else ", or leave them out with data.on_bad_sample=skip"),
    )
