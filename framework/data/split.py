"""Which pictures are held out for validation, decided by content so that the choice survives a growing data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from framework.data.checks import CheckedSample
from framework.errors import DataError


def hold_out(
    samples: Sequence[CheckedSample], *, fraction: float, seed: int, max_samples: int
) -> tuple[list[CheckedSample], list[CheckedSample]]:
    """Split into (to train on, to validate with).

    Each picture is held out with probability `fraction` by a hash of its content and `seed`: adding, removing or
    renaming others doesn't move it, and copies of it fall on the same side. At least one is held out.
    At most `max_samples` of those held out are used (the same ones while the data grows, unless a new one takes a
    place); the others are neither trained on nor validated with, or they would change sides.
    Both lists keep the order of `samples`. Raises DataError when nothing is left to train on.
    """
    if fraction == 0:
        return list(samples), []
    draws = [_draw(sample.content_key, seed) for sample in samples]
    held = {draw for draw in draws if draw < fraction} or set(sorted(draws)[:1])
    train = [sample for sample, draw in zip(samples, draws, strict=True) if draw not in held]
    ranked = sorted((draw, index) for index, draw in enumerate(draws) if draw in held)[:max_samples]
    if not train:
        raise DataError(
            f"holding out {fraction:.0%} of {len(samples)} pictures leaves none to train on",
            hint="set validation.fraction=0, or add pictures",
        )
    return train, [samples[index] for index in sorted(index for _, index in ranked)]


def _draw(content_key: str, seed: int) -> float:
    digest = hashlib.sha256(f"hold_out {seed} {content_key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
