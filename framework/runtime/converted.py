"""Keeps a component's weights in the form in which they rest, in one file, so that they are converted once.

The file is an ordinary safetensors file: FP8 weights are F8_E4M3 with `<layer>.scale_weight` (float32) beside them, the
layout of `framework.plan.published`; the rest has the number format of the plan. Its name holds a hash of everything
that decides its bytes, so that a file of other sources or settings can't be taken for it. Files that are no longer of
use may be deleted at any time between runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock
from torch import Tensor

from framework.atomic import atomic_write
from framework.errors import SourceError
from framework.hub import fetch_place
from framework.inventory import ELEMENT_BITS, read_file_header
from framework.plan.types import (
    SAFETENSORS_NAMES,
    ComponentPlan,
    StoredScale,
    TensorGroup,
    TensorPlan,
    scale_shape,
)
from framework.plan.units import component_units
from framework.runtime.sources import TensorSource, match_files, read_resting

# Raise it when the same sources and settings give other bytes.
_VERSION = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file.   start: byte offset from the beginning of the data."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ELEMENT_BITS[self.dtype] // 8


def use_converted(
    part: ComponentPlan,
    directory: Path,
    *,
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
) -> ComponentPlan:
    """Point a component's plan to a file that holds its weights as they rest; write it first if there is none.

    directory: where such files lie; made if it doesn't exist.   device: encodes.
    on_progress: called with the bytes read since the last call, while the file is written.
    Returns the plan with file, source_key, source_dtype and published_scale of that file (absolute path).
    Tensors lie in the order in which they are fetched, so that what is fetched together is read in one go.
    Memory while writing: the largest tensor.   Several processes may call this at once: one writes, the others wait.
    Raises PlanError and SourceError as loading does, SourceError where the file can't be written.
    """
    folder = fetch_place(part.folder)
    sources = match_files(part, folder)
    entries = _layout(part)
    path = (
        directory.expanduser().absolute() / f"{part.name}-{_fingerprint(part, sources)}.safetensors"
    )
    if _is_whole(path, entries):
        return _pointing_to(path, part, entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _is_whole(path, entries):
                _log.info("%s: writing its weights as they rest to %s", part.name, path)
                _write(path, entries, sources, device, on_progress)
    except OSError as error:
        raise SourceError(
            f"the converted weights of {part.name} can't be written",
            where=str(path),
            found=str(error),
            hint="set model.converted_dir to a folder with room, on a local disk",
        ) from error
    return _pointing_to(path, part, entries)


def _layout(part: ComponentPlan) -> dict[str, _Entry]:
    """Key -> where each tensor will lie: what is fetched first, first; a scale right behind its codes."""
    groups = {tensor.name: group for group in part.groups for tensor in group.tensors}
    planned = {tensor.name: tensor for group in part.groups for tensor in group.tensors}
    moving = (
        slot.tensor.name
        for unit in component_units(part)
        for parcel in unit.parcels
        for slot in parcel.slots
    )
    names = dict.fromkeys((*moving, *planned))
    entries = [e for name in names for e in _entries(groups[name], planned[name])]
    # Readers want each tensor at a multiple of its element's size, and the format allows no gaps: what would put others
    # out of step goes to the end, wide elements first.
    odd = [entry for entry in entries if entry.num_bytes % 4]
    odd.sort(key=lambda entry: -ELEMENT_BITS[entry.dtype])
    placed: dict[str, _Entry] = {}
    end = 0
    for entry in (*(e for e in entries if not e.num_bytes % 4), *odd):
        placed[entry.key] = _Entry(entry.key, entry.dtype, entry.shape, end)
        end += entry.num_bytes
    return placed


def _entries(group: TensorGroup, tensor: TensorPlan) -> Iterable[_Entry]:
    dtype = SAFETENSORS_NAMES[group.states.offload.storage_dtype]
    yield _Entry(_key(tensor), dtype, tensor.shape)
    shape = scale_shape(tensor.shape, group.scaling, group.block_shape)
    if shape is not None:
        yield _Entry(_scale_key(tensor), "F32", _published_shape(tensor, group, shape))


def _key(tensor: TensorPlan) -> str:
    """Its key in the sources; parts of one tensor there go by their names in the module, which differ."""
    return tensor.source_key if tensor.excerpt is None else tensor.name


def _scale_key(tensor: TensorPlan) -> str:
    layer, dot, _ = _key(tensor).rpartition(".")
    return f"{layer}{dot}scale_weight"


def _published_shape(
    tensor: TensorPlan, group: TensorGroup, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """A scale's shape by which other programs multiply: (1,), (O, 1 ...), (O, blocks, 1), else (row blocks, blocks)."""
    if group.scaling == "row":
        return (shape[0], *(1 for _ in tensor.shape[1:]))
    if group.scaling == "block" and group.block_shape is not None and group.block_shape[0] == 1:
        return (*shape, 1)
    return shape


def _fingerprint(part: ComponentPlan, sources: list[TensorSource]) -> str:
    """Hash of everything that decides the file's bytes."""
    files = sorted({s.file for source in sources for s in (source.stored, source.scale) if s})
    layout = [[e.key, e.dtype, e.shape, e.start] for e in _layout(part).values()]
    storage = [
        [
            source.tensor.source_key,
            source.group.scaling,
            source.group.block_shape,
            *(() if source.tensor.excerpt is None else (asdict(source.tensor.excerpt),)),
        ]
        for source in sources
    ]
    said = {
        "version": _VERSION,
        "commit": part.commit,
        "files": [_identity(Path(file), part.commit) for file in files],
        "layout": layout,
        "storage": storage,
    }
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def _identity(path: Path, commit: str | None) -> list[str | int]:
    """What a source file is told by: within a hub commit its name, elsewhere its path and when it was written."""
    status = path.stat()
    if commit is not None:
        return [path.name, status.st_size]
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _is_whole(path: Path, entries: dict[str, _Entry]) -> bool:
    """Whether the file is there with all its tensors; one that was damaged is written anew."""
    if not path.is_file():
        return False
    try:
        found = read_file_header(path)
    except SourceError as error:
        _log.warning("%s is written anew: %s", path, error.message)
        return False
    first = min((tensor.start for tensor in found.values()), default=0)
    return {key: (t.dtype, t.shape, t.start - first) for key, t in found.items()} == {
        key: (entry.dtype, entry.shape, entry.start) for key, entry in entries.items()
    }


def _write(
    path: Path,
    entries: dict[str, _Entry],
    sources: list[TensorSource],
    device: torch.device,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Write the whole file or nothing. The sources are read in their order, each tensor is written to its place."""
    header = _header(entries)
    with atomic_write(path) as file:
        file.write(header)
        file.truncate(len(header) + sum(entry.num_bytes for entry in entries.values()))
        for source, weight in read_resting(sources, device, on_progress):
            entry = entries[_key(source.tensor)]
            _write_tensor(file, len(header) + entry.start, weight.values)
            if weight.dequant_scale is not None:
                scale = entries[_scale_key(source.tensor)]
                _write_tensor(file, len(header) + scale.start, weight.dequant_scale)


def _header(entries: dict[str, _Entry]) -> bytes:
    """The file's beginning: length and JSON, padded with spaces so that the data begins at a multiple of 8."""
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for key, entry in entries.items():
        said[key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.start + entry.num_bytes],
        }
    text = json.dumps(said, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, start: int, values: Tensor) -> None:
    file.seek(start)
    flat = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(flat.numpy().data)


def _pointing_to(path: Path, part: ComponentPlan, entries: dict[str, _Entry]) -> ComponentPlan:
    groups = [
        group.model_copy(
            update={"tensors": tuple(_converted(path, group, t, entries) for t in group.tensors)}
        )
        for group in part.groups
    ]
    return part.model_copy(update={"groups": tuple(groups)})


def _converted(
    path: Path, group: TensorGroup, tensor: TensorPlan, entries: dict[str, _Entry]
) -> TensorPlan:
    values, *beside = (entries[entry.key] for entry in _entries(group, tensor))
    scales = [
        StoredScale(key=e.key, file=str(path), shape=e.shape, source_dtype=e.dtype) for e in beside
    ]
    return tensor.model_copy(
        update={
            "file": str(path),
            "source_key": values.key,
            "source_dtype": values.dtype,
            "excerpt": None,
            "published_scale": scales[0] if scales else None,
        }
    )
