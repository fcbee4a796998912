"""What a source of samples was found to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from framework.data.sample import Sample
from framework.errors import DataError


@dataclass(frozen=True)
class Found:
    """The samples of a source that can be used, in their fixed order, and what is wrong with the others.

    errors: one for each kind of fault, as a run would be refused with.
    num_uncaptioned: pictures without a caption, which are not among the samples.
    """

    samples: Sequence[Sample]
    errors: tuple[DataError, ...] = ()
    num_uncaptioned: int = 0
