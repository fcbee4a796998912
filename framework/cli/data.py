"""`octavo data inspect`: what a data set holds and what is wrong with it, before a run is started on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.progress import Progress
from rich.table import Table

from framework.atomic import atomic_write
from framework.cli.report import error_console, output_console
from framework.errors import ConfigError, Fault
from framework.judge import judge_run
from framework.schema.data_config import DataConfig
from framework.schema.families import FAMILIES, FamilySpec
from framework.schema.run import RunConfig
from framework.schema.validate import judge_section

if TYPE_CHECKING:
    from framework.data.inspect import CountUnits, Inspection
    from framework.data.media import Media

_NUM_NAMED = 10
_CAPTION_CHARACTERS = 90
_PATH_FAMILY = "qwen_image"


def run_inspection(
    words: Sequence[str],
    *,
    contact_sheet: Path | None,
    as_json: bool,
    family: str | None = None,
    config_dir: Path | None = None,
) -> int:
    """Print what a data set holds, as tables or JSON; return 1 where something is wrong with it, else 0.

    words: a path and what differs from the defaults of `data`, or recipe= and overrides.
    contact_sheet: a .png file to draw pictures into.   family: whose buckets are shown; a recipe says it itself.
    Raises ConfigError, and DataError where nothing can be read.
    """
    from framework.data.inspect import inspect_data

    if contact_sheet is not None and contact_sheet.suffix.lower() != ".png":
        message = f"must end in .png, not {contact_sheet.name!r}"
        where = f"command line: --contact-sheet {contact_sheet}"
        raise ConfigError([Fault("--contact-sheet", message, where)])
    config = _recipe_config(words, config_dir) if _names_recipe(words) else None
    data = config.data if config is not None else _path_config(words)
    spec = FAMILIES[config.model.family] if config is not None else _family(family)
    media = _media(spec, data)
    with Progress(console=error_console(), transient=True) as progress:
        task = progress.add_task("checking pictures", total=None)
        found = inspect_data(
            data,
            media=media,
            size_divisor_px=spec.size_divisor_px,
            count_tokens=_tokenizer(config, spec) if config is not None else None,
            cache_dir=Path(data.cache_dir).expanduser() if config is not None else None,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if contact_sheet is not None:
        from framework.data.contact_sheet import contact_sheet as draw_sheet

        with atomic_write(contact_sheet) as file:
            draw_sheet(found.samples, found.bucket_of, media).save(file, "PNG")
    if as_json:
        sys.stdout.write(json.dumps(inspection_json(found), indent=2, ensure_ascii=False) + "\n")
    else:
        _print(found, data, spec)
        if contact_sheet is not None:
            output_console().print(f"Contact sheet: {contact_sheet}")
    return 1 if found.errors or found.broken else 0


def inspection_json(found: Inspection) -> dict[str, Any]:
    """The report for scripts; sizes in pixels."""
    from framework.data.inspect import bucket_text

    return {
        "samples": len(found.samples),
        "epoch_items": found.epoch_items,
        "sources": [vars(source) for source in found.sources],
        "smallest_px": found.smallest,
        "largest_px": found.largest,
        "enlarged": found.enlarged,
        "buckets": [
            {**vars(bucket), "bucket": bucket_text(bucket.bucket)} for bucket in found.buckets
        ],
        "masks": found.masks,
        "controls": {str(number): count for number, count in found.controls.items()},
        "captions": {
            "missing": found.uncaptioned,
            "empty": found.empty_captions,
            "unit": found.unit,
            "longest": [vars(caption) for caption in found.longest],
        },
        "broken": [{"name": bad.sample.name, "reason": bad.reason} for bad in found.broken],
        "duplicates": found.duplicates,
        "errors": [str(error) for error in found.errors],
    }


# ---- what is inspected ---------------------------------------------------------------------------


def _names_recipe(words: Sequence[str]) -> bool:
    return any(word.lstrip("+").startswith("recipe=") for word in words)


def _recipe_config(words: Sequence[str], config_dir: Path | None) -> RunConfig:
    return judge_run(words, use="train", config_dir=config_dir, files="local").valid_config()


def _path_config(words: Sequence[str]) -> DataConfig:
    """The data section that a path and `data.KEY=VALUE` describe."""
    paths = [word for word in words if "=" not in word]
    if len(paths) != 1:
        message = "give one path, or recipe=NAME"
        found = f"command line: {' '.join(words)}" if words else "command line"
        hint = "E.g. octavo data inspect data/pictures, or octavo data inspect recipe=pocket_lora."
        raise ConfigError([Fault("PATH", message, found, hint=hint, code="missing-key")])
    values: dict[str, Any] = {"path": paths[0]}
    where = {"data.path": f"command line: {paths[0]}"}
    faults: list[Fault] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            continue
        where[key] = f"command line: {word}"
        if key.startswith("data."):
            values[key.removeprefix("data.")] = yaml.safe_load(text)
        else:
            hint = "Beside a path only keys of data are read; give recipe=NAME for others."
            message = "is not part of the data"
            faults.append(Fault(key, message, where[key], hint=hint, code="unknown-key"))
    data, wrong = judge_section(
        DataConfig, values, lambda path: where.get(path, "default"), prefix="data"
    )
    if data is None or faults:
        raise ConfigError([*faults, *wrong])
    return data


def _family(name: str | None) -> FamilySpec:
    if name is not None and name not in FAMILIES:
        message = f"there is no model family {name!r}"
        where = f"command line: --family {name}"
        raise ConfigError([Fault("--family", message, where, tuple(FAMILIES))])
    return FAMILIES[name or _PATH_FAMILY]


def _media(spec: FamilySpec, data: DataConfig) -> Media:
    from framework.data.media import Media

    if spec.media == "video":
        return Media(
            "video",
            num_frames=data.num_frames,
            fps=data.fps,
            frame_divisor=spec.frame_divisor,
        )
    if spec.num_controls == 0:
        return Media()
    from framework.models import get_family  # loads torch, but only the family knows these sizes

    control_size = type(get_family(spec.name)).control_size
    return Media(num_controls=spec.num_controls, control_size=control_size)


def _tokenizer(config: RunConfig, spec: FamilySpec) -> CountUnits | None:
    """Counts tokens of the model's (last) tokenizer; None where it isn't on this disk."""
    names = sorted(name for name in spec.extras if name.startswith("tokenizer"))
    folder = _tokenizer_folder(config, spec.extras[names[-1]]) if names else None
    if folder is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def count(captions: Sequence[str]) -> list[int]:
        return [len(tokenizer(caption)["input_ids"]) for caption in captions]

    return count


def _tokenizer_folder(config: RunConfig, subfolder: str) -> Path | None:
    from framework.hub.local import find_folder, snapshot_of

    source, revision = config.model.source, config.model.revision
    local = find_folder(source)
    if local is not None:
        folder = snapshot_of(local if local.is_dir() else local.parent, revision)[0] / subfolder
        return folder if folder.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    name = f"{subfolder}/tokenizer_config.json"
    cached = try_to_load_from_cache(source, name, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


# ---- the report ----------------------------------------------------------------------------------


def _print(found: Inspection, data: DataConfig, spec: FamilySpec) -> None:
    from framework.data.inspect import bucket_text

    console = output_console()
    console.print(
        _table("Data set", ["", ""], [[name, value] for name, value in _facts(found, data).items()])
    )
    if len(found.sources) > 1:
        rows = [[s.path, str(s.samples), f"{s.share:.1%}"] for s in found.sources]
        console.print(_table("Sources", ["path", "samples", "share of an epoch"], rows))
    buckets = [
        [bucket_text(b.bucket), str(b.samples), str(b.batches), f"{b.fill:.0%}"]
        for b in found.buckets
    ]
    title = f"Buckets for {spec.name}, batches of {data.batch_size}"
    console.print(_table(title, ["bucket", "samples", "batches", "full"], buckets))
    longest = [[str(c.length), _short(c.caption), c.name] for c in found.longest]
    counted = (
        "tokens of the caption alone"
        if found.unit == "tokens"
        else "words (in tokens for a recipe whose tokenizer is on this disk)"
    )
    console.print(_table(f"Longest captions, in {counted}", ["", "caption", "of"], longest))
    if found.duplicates:
        rows = [[str(len(names)), ", ".join(names[:3])] for names in found.duplicates[:_NUM_NAMED]]
        console.print(
            _table(_counted("Duplicates", found.duplicates), ["copies", "the same picture"], rows)
        )
    if found.broken:
        rows = [[bad.sample.name, bad.reason] for bad in found.broken[:_NUM_NAMED]]
        console.print(_table(_counted("Broken files", found.broken), ["file", "why"], rows))
    for error in found.errors:
        console.print(f"A run would stop: {error}")


def _facts(found: Inspection, data: DataConfig) -> dict[str, str]:
    sizes = f"{_size(found.smallest)} to {_size(found.largest)} px"
    facts = {
        "samples": str(len(found.samples)),
        "in an epoch": f"{found.epoch_items}, in batches of {data.batch_size}",
        "sizes": sizes,
        "smaller than their bucket": str(found.enlarged),
        "without a caption": str(found.uncaptioned),
        "with an empty caption": str(found.empty_captions),
        "with a mask": str(found.masks),
        "broken": str(len(found.broken)),
        "duplicates": str(sum(len(names) - 1 for names in found.duplicates)),
    }
    if set(found.controls) != {0}:
        numbers = ", ".join(f"{count} with {n}" for n, count in found.controls.items())
        facts["control pictures"] = numbers
    if any(sample.num_frames > 1 for sample in found.samples):
        frames = [sample.num_frames for sample in found.samples]
        facts["frames"] = f"{min(frames)} to {max(frames)} at {data.fps:g} per second"
    return facts


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def _counted(title: str, things: Sequence[object]) -> str:
    rest = len(things) - _NUM_NAMED
    return f"{title} ({len(things)}{f', the first {_NUM_NAMED}' if rest > 0 else ''})"


def _short(caption: str) -> str:
    text = " ".join(caption.split())
    return text if len(text) <= _CAPTION_CHARACTERS else text[: _CAPTION_CHARACTERS - 1] + "…"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
