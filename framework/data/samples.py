"""Which pictures and captions a data set holds, read without opening a picture.

A source is a folder of pictures with captions beside them (`folders.py`), a metadata file or a folder with one
(`tables.py`), WebDataset shards, or a data set of the hub (`archives.py`). A metadata file wins over captions beside
pictures.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from framework.data.archives import read_hub_samples, read_shards
from framework.data.folders import read_folder
from framework.data.found import Found
from framework.data.listing import list_first
from framework.data.media import PICTURES, Media
from framework.data.places import PICTURE_SUFFIXES, exists
from framework.data.sample import Sample
from framework.data.tables import read_table
from framework.errors import DataError
from framework.schema import DataConfig
from framework.schema.data_config import DataSource
from framework.schema.data_paths import (
    HUB_SCHEME,
    SHARD_SUFFIX,
    TABLE_SUFFIXES,
    expand_pattern,
)

METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl", "metadata.parquet")


def read_samples(config: DataConfig, media: Media = PICTURES) -> list[Sample]:
    """List the samples of all sources, in a fixed order: of the source, of its file, or sorted by path.

    media: whether clips, and control pictures, are wanted.
    Sub-folders are searched; files and folders whose names begin with a dot are passed over.
    Raises DataError, before any picture is opened, for: a path that doesn't exist, two metadata files,
    wrong columns, bad lines, missing captions, missing control pictures, an empty data set, and (unless
    `on_bad_sample` is `skip`, where the check counts them) pictures that are listed but missing.
    """
    samples: list[Sample] = []
    for number, source in enumerate(config.all_sources):
        found = find_samples(source, media, number=number)
        if found.errors:
            raise found.errors[0]
        if config.on_bad_sample == "error":
            _refuse_missing(found.samples, source.path)
        samples += found.samples
    return samples


def find_samples(source: DataSource, media: Media = PICTURES, *, number: int = 0) -> Found:
    """What one source holds, with what is wrong beside it.   number: position of the source, for `Sample.source`.

    Raises DataError where nothing can be read at all.
    """
    found = _read(source, media)
    samples = [replace(sample, source=number) if number else sample for sample in found.samples]
    errors = (*found.errors, *_wrong_controls(samples, media, source.path))
    return Found(samples, errors, found.num_uncaptioned)


def resolve_repeats(samples: Sequence[Sample], config: DataConfig) -> int | tuple[float, ...]:
    """How often each sample stands in an epoch, for `BatchPlan`: one number for all where they are alike.

    samples: those that are trained on, after the check and the split.
    Without weights it is `data.repeats` x the source's `repeats` x the sample's own (a folder `10_name`).
    With weights, an epoch keeps that length, and source i has the share weight_i / (sum of weights) of it: the
    repeats of its samples are all multiplied by (its share of the epoch by weight) / (its share by number). The
    factor is a real number; `BatchPlan` says how it becomes whole occurrences.
    """
    sources = config.all_sources
    repeats = [config.repeats * sources[s.source].repeats * s.repeats for s in samples]
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights) and samples:
        length = [0] * len(sources)
        for sample, count in zip(samples, repeats, strict=True):
            length[sample.source] += count
        # A source of which nothing is left, e.g. after the check, leaves its share to the others.
        shares = [
            weight or 0.0 if size else 0.0 for weight, size in zip(weights, length, strict=True)
        ]
        factors = [
            share / sum(shares) * sum(length) / size if size else 0.0
            for share, size in zip(shares, length, strict=True)
        ]
        return tuple(
            count * factors[sample.source] for sample, count in zip(samples, repeats, strict=True)
        )
    if len(set(repeats)) <= 1:
        return repeats[0] if repeats else config.repeats
    return tuple(float(count) for count in repeats)


def _read(source: DataSource, media: Media) -> Found:
    if source.path.startswith(HUB_SCHEME):
        found = read_hub_samples(source.path, media)
        if not found.samples and not found.errors:
            raise DataError("the data set has no rows", where=source.path)
        return found
    base = Path(source.base_dir).expanduser() if source.base_dir is not None else None
    path = Path(source.path).expanduser()
    if shards := _shards(source.path, path):
        found = read_shards(shards, media)
        if not found.samples and not found.errors:
            raise DataError(
                "no pictures in the shards",
                where=source.path,
                found="no member that ends in .jpg, .png, .webp, …",
            )
        return found
    if not path.exists():
        raise _unknown_path(path)
    if path.is_dir():
        return _read_dir(path, media, base)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return read_table(path, media, base_dir=base)
    raise DataError(
        "data.path is neither a folder nor a .csv, .json, .jsonl, .parquet or .tar file",
        where=str(path),
        hint="give the folder that holds the pictures",
    )


def _read_dir(path: Path, media: Media, base: Path | None) -> Found:
    tables = [path / name for name in METADATA_NAMES if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(
            "more than one metadata file in the folder, which may disagree",
            where=str(path),
            found=", ".join(table.name for table in tables),
            hint="remove all but one, or give one of them as data.path",
        )
    if tables:
        return read_table(tables[0], media, base_dir=base)
    found = read_folder(path, media)
    if not found.samples and not found.errors:
        raise _no_pictures(path)
    return found


def _shards(typed: str, path: Path) -> list[Path]:
    """The tar archives that a path names: one, a brace pattern, or those of a folder without pictures or metadata."""
    if path.is_dir():
        files = [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")]
        tars = sorted(f for f in files if f.suffix.lower() == SHARD_SUFFIX)
        others = any(
            f.name in METADATA_NAMES or f.suffix.lower() in PICTURE_SUFFIXES for f in files
        )
        return [] if others else tars
    if path.suffix.lower() != SHARD_SUFFIX or path.exists():
        return [path] if path.suffix.lower() == SHARD_SUFFIX else []
    files = [Path(name).expanduser() for name in expand_pattern(typed)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing and files != [path]:
        raise DataError(
            f"{len(missing)} of {len(files)} shards do not exist",
            where=typed,
            found=list_first(missing),
            hint="correct the numbers in braces, or fetch the shards that are missing",
        )
    return [] if missing else files


def _unknown_path(path: Path) -> DataError:
    parent = path.parent
    if parent.is_dir():
        names = sorted(entry.name for entry in parent.iterdir())
        nearest = difflib.get_close_matches(path.name, names, n=3)
        found = f"{parent.resolve()} holds {', '.join(nearest) or 'nothing of a similar name'}"
    else:
        found = f"the folder {parent} does not exist either"
    return DataError(
        "data.path does not exist",
        where=str(path),
        found=found,
        hint="correct data.path; a relative path starts at the folder in which the command runs",
    )


def _no_pictures(folder: Path) -> DataError:
    tables = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
    found = f"none of {', '.join(METADATA_NAMES)}, and no .png, .jpg, .webp, …"
    hint = "give a folder of pictures with .txt captions, or a .csv, .json, .jsonl or .parquet file"
    if tables:
        found += f"; but {list_first(tables)}"
        hint = f"give the file itself: data.path={folder / tables[0]}"
    return DataError("no pictures in the folder", where=str(folder), found=found, hint=hint)


def _wrong_controls(samples: Sequence[Sample], media: Media, where: str) -> tuple[DataError, ...]:
    if media.num_controls == 0:
        return ()
    wrong = [s for s in samples if not 1 <= len(s.controls) <= media.num_controls]
    if not wrong:
        return ()
    wanted = "1" if media.num_controls == 1 else f"1 to {media.num_controls}"
    named = [f"{sample.name}: {len(sample.controls)}" for sample in wrong]
    error = DataError(
        f"{len(wrong)} of {len(samples)} pictures don't have {wanted} control pictures, as this model needs",
        where=where,
        found=list_first(named, separator="; "),
        hint="list them in a column edit_image (a path, or a JSON list of paths), or lay them beside"
        " the pictures as NAME.control.png",
    )
    return (error,)


def _refuse_missing(samples: Sequence[Sample], source: str) -> None:
    missing: list[str] = []
    for sample in samples:
        place = next((place for place in sample.places if not exists(place)), None)
        if place is not None:
            picture = place == sample.picture
            missing.append(sample.name if picture else f"{place} (for {sample.name})")
    if missing:
        raise DataError(
            f"{len(missing)} of {len(samples)} listed pictures do not exist",
            where=source,
            found=list_first(missing),
            hint="paths are relative to the file that lists them; correct them, or leave these rows out"
            " with data.on_bad_sample=skip",
        )
