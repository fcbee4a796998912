"""What one model family trains on: pictures or clips, with or without control pictures.

A bucket is a tuple of whole numbers that all samples of a batch share: (width, height) in pixels, followed by the
number of frames for clips, or by width and height of each control picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from framework.errors import DataError

Size = tuple[int, int]  # width, height in pixels
Bucket = tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """How samples are read.

    kind: pictures, or clips (of which a picture is one with a single frame).
    num_controls: how many control pictures a sample may have; 0 passes them over, otherwise it must have one at least.
    control_size: the size that a control picture of a given size is brought to, which its samples share a batch by;
    None keeps every size apart. A function of a module, so that worker processes can be given it.
    num_frames, fps: most frames of a clip, and their rate per second.   frame_divisor: frames are k x divisor + 1.
    """

    kind: Literal["image", "video"] = "image"
    num_controls: int = 0
    control_size: Callable[[Size], Size] | None = None
    num_frames: int = 81
    fps: float = 16.0
    frame_divisor: int = 4

    def __post_init__(self) -> None:
        if self.kind == "video" and self.num_frames % self.frame_divisor != 1 % self.frame_divisor:
            below = (self.num_frames - 1) // self.frame_divisor * self.frame_divisor + 1
            raise DataError(
                f"data.num_frames = {self.num_frames} is not a multiple of {self.frame_divisor} plus 1",
                hint=f"set data.num_frames={below} or {below + self.frame_divisor}",
            )

    def frames_for(self, available: int) -> int:
        """The largest allowed number of frames that a clip with so many (at `fps`) can give."""
        frames = min(available, self.num_frames)
        return (frames - 1) // self.frame_divisor * self.frame_divisor + 1

    def control_sizes(self, sizes: Sequence[Size]) -> tuple[Size, ...]:
        """The sizes that control pictures are brought to."""
        return tuple(self.control_size(size) if self.control_size else size for size in sizes)


PICTURES = Media()


def size_px_of(bucket: Bucket) -> Size:
    """Width and height in pixels of a bucket's pictures or frames."""
    return bucket[0], bucket[1]


def num_frames_of(bucket: Bucket) -> int:
    """Frames of a bucket's clips; 1 for pictures."""
    return bucket[2] if len(bucket) == 3 else 1
