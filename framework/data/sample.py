"""One sample, not read yet: where its picture, caption, mask and control pictures are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from framework.data.places import Place, read_place_bytes


@dataclass(frozen=True)
class Sample:
    """One picture (or clip) and its caption.

    picture: a file, or a place inside a table or an archive.   caption: stripped; may be empty.
    listed_in: "metadata.csv:3" where a metadata file names it, "" where a caption file lies beside it.
    mask: where the loss counts, white, and where not, black; None for everywhere.
    controls: pictures that an editing model is shown beside the caption, in order.
    noise_seed: of the noise that a teacher made the picture from, where the table says it.
    repeats: how often it stands in an epoch of its source.   source: position among `data.sources`, from 0.
    """

    picture: Place
    caption: str
    listed_in: str = ""
    mask: Place | None = None
    controls: tuple[Place, ...] = ()
    noise_seed: int | None = None
    repeats: int = 1
    source: int = 0

    @property
    def name(self) -> str:
        """What the picture is called in messages."""
        place = f" ({self.listed_in})" if self.listed_in and isinstance(self.picture, Path) else ""
        return f"{self.picture}{place}"

    @property
    def places(self) -> tuple[Place, ...]:
        """Everything that is read beside the caption, the picture first."""
        return (self.picture, *([] if self.mask is None else [self.mask]), *self.controls)


def read_picture_bytes(sample: Sample) -> bytes:
    """Read the encoded picture (PNG, JPEG, …) from disk. Raises DataError when it can't be read."""
    return read_place_bytes(sample.picture, name=sample.name)
