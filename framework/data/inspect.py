"""What a data set holds, as numbers: how many samples, of which sizes, in which buckets, and what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.data.buckets import bucket_of, make_buckets
from framework.data.checks import BadSample, CheckedSample, check_samples
from framework.data.media import Bucket, Media, Size, num_frames_of, size_px_of
from framework.data.samples import find_samples, resolve_repeats
from framework.errors import DataError
from framework.schema import DataConfig

CountUnits = Callable[[Sequence[str]], list[int]]
NUM_LONGEST = 5


@dataclass(frozen=True)
class SourceCount:
    """One source.   samples: that can be trained on.   share: of an epoch, 0 to 1, with repeats and weight."""

    path: str
    samples: int
    share: float


@dataclass(frozen=True)
class BucketCount:
    """One bucket.

    batches: in one pass over its samples.   fill: samples / (batches x batch size); what is missing is filled with
    samples of the next pass.
    """

    bucket: Bucket
    samples: int
    batches: int
    fill: float


@dataclass(frozen=True)
class LongCaption:
    """A caption and its length in the inspection's units."""

    length: int
    name: str
    caption: str


@dataclass(frozen=True)
class Inspection:
    """All that is told of a data set.

    samples, bucket_of: those that can be trained on, and the bucket of each.   epoch_items: occurrences in an epoch.
    broken: files that can't be read.   duplicates: names of the samples that are one picture, bit by bit.
    uncaptioned: pictures without a caption; empty_captions: with an empty one.
    enlarged: samples with fewer pixels than their bucket.   unit: of lengths, "tokens" or "words".
    errors: what a run would be refused with.
    """

    samples: tuple[CheckedSample, ...]
    bucket_of: tuple[Bucket, ...]
    sources: tuple[SourceCount, ...]
    buckets: tuple[BucketCount, ...]
    broken: tuple[BadSample, ...]
    duplicates: tuple[tuple[str, ...], ...]
    longest: tuple[LongCaption, ...]
    unit: str
    epoch_items: int
    uncaptioned: int
    empty_captions: int
    masks: int
    controls: dict[int, int]
    enlarged: int
    errors: tuple[DataError, ...]

    @property
    def smallest(self) -> Size:
        """Width and height of the sample with fewest pixels."""
        return min((s.size for s in self.samples), key=lambda size: size[0] * size[1])

    @property
    def largest(self) -> Size:
        """Width and height of the sample with most pixels."""
        return max((s.size for s in self.samples), key=lambda size: size[0] * size[1])


def inspect_data(
    config: DataConfig,
    *,
    media: Media,
    size_divisor_px: int,
    count_tokens: CountUnits | None = None,
    cache_dir: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Read and check every sample of a data set; nothing stops at the first fault.

    size_divisor_px: of the family.   count_tokens: lengths of captions; None counts words.
    cache_dir: where the results of the check are kept; None keeps none.
    Raises DataError where a source can't be read at all, or no sample can be used.
    """
    found = [
        find_samples(source, media, number=number)
        for number, source in enumerate(config.all_sources)
    ]
    errors = tuple(error for source in found for error in source.errors)
    listed = [sample for source in found for sample in source.samples]
    if not listed and errors:
        raise errors[0]
    report = check_samples(
        listed,
        on_bad_sample="skip",
        media=media,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )
    samples = report.samples
    sizes = make_buckets(
        config.max_px, divisor_px=size_divisor_px, max_aspect_ratio=config.max_aspect_ratio
    )
    buckets = tuple(bucket_of(sample, buckets=sizes, media=media) for sample in samples)
    repeats = resolve_repeats([checked.sample for checked in samples], config)
    weights = [float(repeats)] * len(samples) if isinstance(repeats, int) else list(repeats)
    return Inspection(
        samples=samples,
        bucket_of=buckets,
        sources=_count_sources(config, samples, weights),
        buckets=_count_buckets(buckets, config.batch_size),
        broken=report.skipped,
        duplicates=_duplicates(samples),
        longest=_longest(samples, count_tokens or count_words),
        unit="words" if count_tokens is None else "tokens",
        epoch_items=round(sum(weights)),
        uncaptioned=sum(source.num_uncaptioned for source in found),
        empty_captions=sum(not checked.sample.caption for checked in samples),
        masks=sum(checked.sample.mask is not None for checked in samples),
        controls=dict(sorted(Counter(len(checked.control_keys) for checked in samples).items())),
        enlarged=sum(
            sample.size[0] < size_px_of(bucket)[0] or sample.size[1] < size_px_of(bucket)[1]
            for sample, bucket in zip(samples, buckets, strict=True)
        ),
        errors=errors,
    )


def count_words(captions: Sequence[str]) -> list[int]:
    """Words of each caption."""
    return [len(caption.split()) for caption in captions]


def bucket_text(bucket: Bucket) -> str:
    """Write a bucket for people: "832 x 1216", "832 x 480, 81 frames", "64 x 64 with 32 x 32"."""
    width, height = size_px_of(bucket)
    text = f"{width} x {height}"
    if len(bucket) == 3:
        frames = num_frames_of(bucket)
        return f"{text}, {frames} frame{'' if frames == 1 else 's'}"
    pairs = zip(bucket[2::2], bucket[3::2], strict=True)
    controls = ", ".join(f"{width} x {height}" for width, height in pairs)
    return f"{text} with {controls}" if controls else text


def _count_sources(
    config: DataConfig, samples: Sequence[CheckedSample], repeats: Sequence[float]
) -> tuple[SourceCount, ...]:
    counts = Counter(checked.sample.source for checked in samples)
    items: dict[int, float] = defaultdict(float)
    for checked, count in zip(samples, repeats, strict=True):
        items[checked.sample.source] += count
    return tuple(
        SourceCount(source.path, counts[number], items[number] / sum(repeats))
        for number, source in enumerate(config.all_sources)
    )


def _count_buckets(buckets: Sequence[Bucket], batch_size: int) -> tuple[BucketCount, ...]:
    counted = []
    for bucket, samples in sorted(Counter(buckets).items()):
        batches = -(-samples // batch_size)
        counted.append(BucketCount(bucket, samples, batches, samples / (batches * batch_size)))
    return tuple(counted)


def _duplicates(samples: Sequence[CheckedSample]) -> tuple[tuple[str, ...], ...]:
    names: dict[str, list[str]] = defaultdict(list)
    for checked in samples:
        names[checked.content_key].append(checked.sample.name)
    return tuple(tuple(same) for same in names.values() if len(same) > 1)


def _longest(samples: Sequence[CheckedSample], count: CountUnits) -> tuple[LongCaption, ...]:
    first = {checked.sample.caption: checked.sample.name for checked in reversed(samples)}
    captions = list(reversed(first))
    lengths = count(captions)
    ranked = sorted(zip(lengths, captions, strict=True), key=lambda pair: -pair[0])
    return tuple(
        LongCaption(length, first[caption], caption) for length, caption in ranked[:NUM_LONGEST]
    )
