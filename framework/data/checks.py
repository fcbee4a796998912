"""Every picture is decoded once before training, so that a broken one is named at the start and not hours later."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from framework.data.images import Size, content_key, decode_image
from framework.data.listing import count_of, list_first
from framework.data.samples import Sample, read_picture_bytes
from framework.data.stamps import Stamp, StampBook, read_file_state
from framework.errors import DataError, RunError

_NUM_NAMED = 50  # broken pictures written out in the error
_MAX_THREADS = 8  # Pillow decodes without Python's lock; a guess


@dataclass(frozen=True)
class CheckedSample:
    """A sample whose picture decodes.

    content_key: sha256 of the encoded picture.   size: (width, height) in pixels as the picture is seen.
    """

    sample: Sample
    content_key: str
    size: Size


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
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every picture and learn its size and content; fast for pictures that were checked before.

    cache_dir: results are kept in `checked/` below it and trusted while a file's size and times stay the same.
    on_progress: called with (done, total) now and then, from the calling thread.
    Raises DataError that names the broken pictures (with `on_bad_sample: error`), or when none is left.
    """
    book = StampBook(cache_dir / "checked" if cache_dir is not None else None)
    good: list[CheckedSample] = []
    bad: list[BadSample] = []
    for done, (sample, result) in enumerate(_check_all(samples, book), start=1):
        if isinstance(result, Stamp):
            book.add(sample, result)
            size = (result.width_px, result.height_px)
            good.append(CheckedSample(sample, result.content_key, size))
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


def _check_all(samples: Sequence[Sample], book: StampBook) -> Iterator[tuple[Sample, Stamp | str]]:
    """Yield the stamp, or what is wrong, of each sample in order."""
    found = [book.find(sample) for sample in samples]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        new = pool.map(
            _check, [sample for sample, stamp in zip(samples, found, strict=True) if stamp is None]
        )
        for sample, stamp in zip(samples, found, strict=True):
            yield sample, stamp if stamp is not None else next(new)


def _check(sample: Sample) -> Stamp | str:
    state = read_file_state(sample)  # before reading: a change in between must not look checked
    try:
        data = read_picture_bytes(sample)
        width_px, height_px = decode_image(data, name=sample.name).size
    except DataError as error:
        return error.found or error.message
    return Stamp(*(state or (0, 0, 0)), width_px, height_px, content_key(data))


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
