"""Data sets of kohya's trainers: their TOML files, or folders of the kind 10_name, as `data` here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.migrate.draft import Draft
from framework.migrate.given import Given
from framework.migrate.length import count_pictures, count_rows, steps_per_epoch
from framework.migrate.shared import set_sources

_PLACES = (
    "image_dir", "image_directory", "video_directory", "image_jsonl_file", "video_jsonl_file", "metadata_file",
)  # fmt: skip
_CACHES = (
    "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
    "skip_cache_check",
)  # fmt: skip
_DEFAULT_SIDES = {"kohya-ss/musubi-tuner": [960, 544]}


def set_data(
    given: Given, dataset: Mapping[str, Any], family: str, *, processes: int, accumulation: int
) -> int | None:
    """Write the section `data`; returns the optimizer steps of an epoch, None where pictures can't be counted.

    dataset: content of the data set file; empty where there is none.
    """
    draft = given.draft
    folder = "" if dataset else given.text("train_data_dir")
    parts = _parts(dataset) if dataset else _parts_of_folder(folder)
    settings = dict(given.values)
    for part in parts:
        settings |= {key: value for key, value in part.items() if key not in given.values}
    described = Given(settings, given.table, draft, given.where, given.taken)
    sources, items = _sources(described, parts)
    if folder:  # its sub-folders 10_name are read with their repeats
        sources = [(folder, 1)]
    name = "dataset_config" if given.has("dataset_config") or dataset else "train_data_dir"
    set_sources(draft, sources, name)
    given.take("dataset_config")
    size = _same(described, parts, "batch_size") or described.take("train_batch_size") or 1
    described.take("train_batch_size")
    batch = max(1, int(described.as_number("batch_size", size) or 1))
    draft.set_("data.batch_size", batch, "batch_size")
    _set_sizes(described, parts)
    _set_clips(described, family)
    _set_captions(described)
    for name in _CACHES:
        if described.table.row(name) is not None and described.is_on(name):
            draft.set_("data.cache", True, name)
    if "control_directory" in settings:
        row = given.table.row("control_directory")
        draft.note("check", "control_directory", row.note if row else "")
        described.take("control_directory")
    described.values = {k: v for k, v in settings.items() if k not in given.values}
    described.settle_rest()
    given.taken = described.taken
    if not items:
        return None
    return steps_per_epoch(items, batch_size=batch, processes=processes, accumulation=accumulation)


def _parts(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict for each folder, with what its data set and [general] say of it; nearer sections win."""
    general = dataset.get("general")
    common = general if isinstance(general, dict) else {}
    parts = []
    for each in _tables(dataset.get("datasets")):
        own = {key: value for key, value in each.items() if key != "subsets"}
        for subset in _tables(each.get("subsets")) or [{}]:
            parts.append({**common, **own, **subset})
    return parts


def _tables(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _parts_of_folder(folder: str) -> list[dict[str, Any]]:
    """The folders `<repeats>_<name>` below `train_data_dir`, or that folder as it is; none for ""."""
    if not folder:
        return []
    try:
        below = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    except OSError:
        below = []
    named = [(path, match) for path in below if (match := re.match(r"(\d+)_", path.name))]
    found = [{"image_dir": path.as_posix(), "num_repeats": int(match[1])} for path, match in named]
    return found or [{"image_dir": folder}]


def _sources(described: Given, parts: list[dict[str, Any]]) -> tuple[list[tuple[str, int]], int]:
    """(path, repeats) of each folder, and the pictures of an epoch; 0 where one can't be counted."""
    draft, sources, items, complete = described.draft, [], 0, True
    for part in parts:
        place = next((str(part[name]) for name in _PLACES if part.get(name)), "")
        if not place:
            continue
        if part.get("is_reg"):
            draft.note(
                "lost", f"is_reg {place}", "There are no regularisation pictures; it is left out."
            )
            continue
        repeats = int(described.as_number("num_repeats", part.get("num_repeats", 1)) or 1)
        sources.append((place, repeats))
        path = Path(place)
        count = count_rows(path) if path.suffix else count_pictures(path)
        complete = complete and bool(count)
        items += (count or 0) * repeats
    described.taken |= {*_PLACES, "num_repeats", "dataset_repeats", "is_reg", "train_data_dir"}
    for name in ("image_jsonl_file", "video_jsonl_file", "metadata_file"):
        row = described.table.row(name)
        if row is not None and described.has(name):
            draft.note("check", name, row.note)
    return sources, items if complete else 0


def _same(described: Given, parts: list[dict[str, Any]], name: str) -> Any:
    """The value of a setting that must be one for all data; the first where they differ, which is told."""
    described.take(name)
    values = [part[name] for part in parts if part.get(name) is not None]
    if any(value != values[0] for value in values):
        text = f"Data sets have different values ({values}); {values[0]} is taken for all."
        described.draft.note("lost", name, text)
    return values[0] if values else described.values.get(name)


def _set_sizes(described: Given, parts: list[dict[str, Any]]) -> None:
    draft, table = described.draft, described.table
    resolution = _same(described, parts, "resolution") or _DEFAULT_SIDES.get(table.trainer)
    if resolution is None:
        return
    sides = [int(side) for side in re.findall(r"\d+", str(resolution)) if int(side)]
    if not sides:
        described.as_number("resolution", resolution)
        return
    width, height = sides[0], sides[-1]
    source = f"resolution {resolution}" if described.has("resolution") else "resolution not given"
    draft.set_("data.max_px", width * height, f"{source}: {width} x {height}")
    row = table.row("resolution")
    draft.note("changed", "resolution", row.note if row else "")
    if not described.is_on("enable_bucket"):
        ratio = max(width, height) / min(width, height)
        draft.set_("data.max_aspect_ratio", round(ratio, 3), described.source("enable_bucket"))


def _set_clips(described: Given, family: str) -> None:
    if described.table.row("target_frames") is None:
        return
    frames = described.take("target_frames")
    if family.startswith("wan"):
        numbers = (frames if isinstance(frames, list) else [frames]) or [1]
        counts = [int(described.as_number("target_frames", n or 1) or 1) for n in numbers]
        source = described.source("target_frames")
        described.draft.set_("data.num_frames", max(counts), source)
        if len(numbers) > 1:
            row = described.table.row("target_frames")
            described.draft.note("changed", "target_frames", row.note if row else "")


def _set_captions(described: Given) -> None:
    default = ".caption" if described.table.row("class_tokens") else ".txt"
    misspelt = described.take("caption_extention")  # an old name of theirs
    suffix = described.text("caption_extension", str(misspelt or default))
    _check_suffix(described.draft, f".{suffix.lstrip('.')}")


def _check_suffix(draft: Draft, suffix: str) -> None:
    if suffix not in (".txt", ".caption"):
        draft.note("check", f"caption_extension {suffix}", "Captions must lie in .txt files.")
