"""Clips: video files (decoded by PyAV), animations and folders of frames (decoded by Pillow), resampled by time.

F, H, W: frames, height and width in pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageSequence

from framework.data.images import (
    DECODE_ERRORS,
    build_pixels,
    content_key,
    decode_image,
    flatten_frame,
)
from framework.data.media import Size
from framework.data.places import VIDEO_SUFFIXES, FrameFolder, Place, suffix_of
from framework.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON_SECONDS = 1e-4  # times in a file are rounded to its own clock, often 1 ms or finer
_DEFAULT_GIF_SECONDS = 0.1  # what browsers take for a frame without a duration


@dataclass(frozen=True)
class ClipInfo:
    """What the check learns of a clip.

    size: (width, height) in pixels as seen.   num_frames: in the file.   seconds: how long it lasts; 0 where frames
    have no times (a folder of frames, a still picture).
    """

    size: Size
    num_frames: int
    seconds: float


def clip_key(place: Place, data: bytes) -> str:
    """Name a clip by its content; for a folder of frames by that of each frame."""
    if not isinstance(place, FrameFolder):
        return content_key(data)
    digests = [content_key(frame.read_bytes()) for frame in place.frames()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def read_clip_info(place: Place, data: bytes) -> ClipInfo:
    """Decode a clip once from end to end. Raises DataError for a damaged one, and for frames that differ in size."""
    sizes: set[Size] = set()
    num_frames, seconds = 0, 0.0
    for _, end, frame in _frames(place, data):
        sizes.add(frame.size)
        num_frames, seconds = num_frames + 1, end
    if num_frames == 0:
        raise DataError("the clip has no frames", where=str(place))
    if len(sizes) > 1:
        raise DataError(
            "the frames of the clip differ in size",
            where=str(place),
            found=", ".join(f"{width} x {height}" for width, height in sorted(sizes)),
        )
    timed = not isinstance(place, FrameFolder) and num_frames > 1
    return ClipInfo(sizes.pop(), num_frames, seconds if timed else 0.0)


def frames_at(num_frames: int, seconds: float, fps: float) -> int:
    """How many frames a clip gives at a rate: one for each 1/fps seconds begun; all of a clip without times."""
    if seconds == 0:
        return num_frames
    return max(1, math.ceil((seconds - _EPSILON_SECONDS) * fps))


def build_clip_pixels(
    place: Place, data: bytes, *, size: Size, num_frames: int, fps: float
) -> Tensor:
    """Read the first frames of a clip at `fps`, scaled and cropped as `build_pixels` does.

    Frame i is the one that is seen at i / fps seconds. A clip without times is read frame by frame.
    Returns (3, F, H, W) float32 in [-1, 1]. Raises DataError when the clip is shorter than that.
    """
    import torch

    wanted: list[Tensor] = []
    untimed = isinstance(place, FrameFolder)
    for start, end, frame in _frames(place, data):
        pixels: Tensor | None = None
        while len(wanted) < num_frames and (
            untimed or num_frames == 1 or len(wanted) / fps < end - _EPSILON_SECONDS
        ):
            pixels = build_pixels(frame, size) if pixels is None else pixels
            wanted.append(pixels)
            if untimed:
                break
        if len(wanted) == num_frames:
            return torch.stack(wanted, dim=1)
        assert start <= end
    raise DataError(
        "the clip is shorter than it was when it was checked",
        where=str(place),
        found=f"{len(wanted)} of {num_frames} frames",
        hint="start the command again",
    )


def read_preview(place: Place, data: bytes) -> Image.Image:
    """The first frame, RGB. Raises DataError when there is none."""
    for _, _, frame in _frames(place, data):
        return frame
    raise DataError("the clip has no frames", where=str(place))


def _frames(place: Place, data: bytes) -> Iterator[tuple[float, float, Image.Image]]:
    """(begin, end in seconds, RGB picture) of each frame, in order of time."""
    if isinstance(place, FrameFolder):
        for number, file in enumerate(place.frames()):
            yield number, number + 1.0, decode_image(file.read_bytes(), name=str(file))
    elif suffix_of(place) in VIDEO_SUFFIXES:
        yield from _video_frames(str(place), data)
    else:
        yield from _animation_frames(str(place), data)


def _animation_frames(name: str, data: bytes) -> Iterator[tuple[float, float, Image.Image]]:
    first = decode_image(data, name=name)  # also refuses what isn't a picture
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if getattr(picture, "n_frames", 1) == 1:
                yield 0.0, 1.0, first
                return
            begin = 0.0
            for frame in ImageSequence.Iterator(picture):
                frame.load()
                milliseconds = float(frame.info.get("duration") or 0)
                seconds = milliseconds / 1000 if milliseconds > 0 else _DEFAULT_GIF_SECONDS
                yield begin, begin + seconds, flatten_frame(frame)
                begin += seconds
    except DECODE_ERRORS as error:
        raise _broken(name, error) from error


def _video_frames(name: str, data: bytes) -> Iterator[tuple[float, float, Image.Image]]:
    av = _import_av(name)
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise DataError("the file holds no video", where=name)
            stream = container.streams.video[0]
            # More threads would not end before a fork, and the check has threads of its own.
            stream.thread_type = "NONE"
            rate = stream.average_rate or stream.guessed_rate
            usual = float(1 / rate) if rate else 1 / 24
            yield from _with_ends(container.decode(stream), usual)
    except (av.FFmpegError, ValueError) as error:
        raise _broken(name, error) from error


def _with_ends(frames: Iterator[Any], usual: float) -> Iterator[tuple[float, float, Image.Image]]:
    """Frames from time 0 on; each lasts until the next begins, the last one as long as usual."""
    held: tuple[float, Image.Image] | None = None
    origin: float | None = None
    for frame in frames:
        if frame.is_corrupt:
            raise ValueError("a frame is damaged")
        time = frame.time if frame.time is not None else (held[0] + usual if held else 0.0)
        origin = time if origin is None else origin
        picture = frame.to_image()
        if frame.rotation % 360:  # as phones write it; counter-clockwise, in degrees
            picture = picture.rotate(frame.rotation, expand=True)
        if held is not None:
            yield held[0], time - origin, held[1]
        held = (time - origin, picture)
    if held is not None:
        yield held[0], held[0] + usual, held[1]


def _import_av(name: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            "reading video files needs the library `av`",
            where=name,
            hint='pip install "octavo[video]", or give folders of frames',
        ) from error
    return av


def _broken(name: str, error: BaseException) -> DataError:
    return DataError("the clip can't be read", where=name, found=str(error) or type(error).__name__)
