"""Samples of WebDataset shards and of hub data sets.

A sample of a shard is the files of one base name: `7.jpg` (or .png, .webp, .mp4, …), its caption in `7.txt`,
`7.caption` or `7.json` (key prompt, text or caption), and where there are such, `7.mask.png`, and `7.edit_image.png` or
`7.edit_image_0.png`, `7.edit_image_1.png`, ….
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from framework.data.found import Found
from framework.data.hub_rows import (
    HubCell,
    read_hub_columns,
    read_hub_pictures,
    read_hub_values,
)
from framework.data.listing import list_first
from framework.data.media import Media
from framework.data.places import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from framework.data.sample import Sample
from framework.data.shards import (
    ShardSample,
    TarMember,
    read_member,
    read_member_json,
    read_shard,
)
from framework.data.tables import CAPTION_COLUMNS, bad_rows, choose_columns
from framework.errors import DataError

_CONTROL = re.compile(r"edit_image(?:_(\d+))?\.[^.]+")


def read_shards(files: Sequence[Path], media: Media) -> Found:
    """List the samples of WebDataset shards, in the order of the files and of the members in each.

    Raises DataError for files that aren't uncompressed tar archives, and for captions that can't be read.
    """
    suffixes = PICTURE_SUFFIXES | VIDEO_SUFFIXES if media.kind == "video" else PICTURE_SUFFIXES
    samples: list[Sample] = []
    missing: list[str] = []
    for file in files:
        for found in read_shard(file):
            kind = next((kind for kind in found.members if f".{kind}" in suffixes), None)
            if kind is None:
                continue
            caption = _caption(found)
            if caption is None:
                missing.append(str(found.members[kind]))
                continue
            mask = found.members.get("mask.png")
            controls = _controls(found) if media.num_controls else ()
            samples.append(Sample(found.members[kind], caption, mask=mask, controls=controls))
    if not missing:
        return Found(samples)
    error = DataError(
        f"{len(missing)} of {len(samples) + len(missing)} pictures have no caption",
        where=", ".join(dict.fromkeys(str(file) for file in files[:1])),
        found="none for " + list_first(missing),
        hint="put a .txt, or a .json with the key text, of the same base name into the shard",
    )
    return Found(samples, (error,), len(missing))


def read_hub_samples(source: str, media: Media) -> Found:
    """List the rows of a hub data set; columns as in a metadata file.

    Raises DataError as `read_hub_columns`, and for columns that don't fit.
    """
    columns = choose_columns(read_hub_columns(source), source, media)
    pictures = read_hub_pictures(source, columns.picture)
    extras: list[Sequence[Sequence[HubCell]]] = [
        read_hub_pictures(source, name) if name is not None else [()] * len(pictures)
        for name in (columns.mask, columns.controls)
    ]
    masks, controls = extras
    captions = read_hub_values(source, columns.caption)
    samples: list[Sample] = []
    faults: list[str] = []
    for row, (places, caption, mask, control) in enumerate(
        zip(pictures, captions, masks, controls, strict=True)
    ):
        if not places:
            faults.append(f"row {row}: no picture in {columns.picture!r}")
        elif not isinstance(caption, str):
            faults.append(f"row {row}: no caption in {columns.caption!r}")
        else:
            first = mask[0] if mask else None
            samples.append(Sample(places[0], caption.strip(), "", first, tuple(control)))
    hint = "rows count from 0; take a data set or a split in which every row has both"
    return Found(samples, bad_rows(faults, "bad row", source, hint=hint))


def _caption(sample: ShardSample) -> str | None:
    for kind in ("txt", "caption"):
        if (member := sample.members.get(kind)) is not None:
            return _decode(member)
    if (member := sample.members.get("json")) is None:
        return None
    record = read_member_json(member)
    values = [record[name] for name in CAPTION_COLUMNS if isinstance(record.get(name), str)]
    return str(values[0]).strip() if values else None


def _decode(member: TarMember) -> str:
    try:
        return read_member(member).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            "the caption is not UTF-8 text",
            where=str(member),
            found=str(error),
            hint="save it as UTF-8",
        ) from error


def _controls(sample: ShardSample) -> tuple[TarMember, ...]:
    numbered = [
        (int(found[1] or 0), kind)
        for kind in sample.members
        if (found := _CONTROL.fullmatch(kind)) is not None
    ]
    return tuple(sample.members[kind] for _, kind in sorted(numbered))
