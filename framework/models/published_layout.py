"""Write a fully trained component into the files it was published in, so that other tools load it.

Tensors are written one at a time: beyond the module itself, memory holds the largest tensor once.
The folder appears whole or not at all: it is written beside its final place, synced and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from framework.atomic import sync_path
from framework.errors import PlanError, SourceError
from framework.inventory import (
    StoredTensor,
    file_variant,
    find_index,
    read_file_header,
    read_inventory,
)
from framework.plan.match import module_name
from framework.plan.native_names import read_component
from framework.schema.families import ComponentSpec

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COPY_BYTES = 1 << 22
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file to write: new values, or None to copy the stored bytes."""

    key: str
    stored: StoredTensor
    source: Path
    values: Tensor | None
    dtype_name: str

    @property
    def num_bytes(self) -> int:
        if self.values is None:
            return self.stored.num_bytes
        return prod(self.stored.shape) * _DTYPES[self.dtype_name].itemsize


def save_component(
    spec: ComponentSpec,
    module: nn.Module,
    folder: Path,
    *,
    source_folder: Path,
    source_files: Sequence[Path] | None = None,
    storage_dtype: torch.dtype | None = None,
) -> None:
    """Write `module` as `folder`, with the file names, keys and configs of `source_folder`.

    source_files: that it was loaded from; None for those of the folder. What they call it otherwise than published, or
    hold beside it, is written in published names as one file; and no file is named after a variant.
    storage_dtype: of the trained tensors; None keeps each one's published dtype (bf16 for FP8
    files). Tensors that the family never loads are copied byte for byte. An existing `folder` is
    replaced.
    Raises PlanError where the module's tensors and the published ones aren't the same set.
    """
    inventory = _inventory(source_folder, source_files)
    entries = _pair(spec, module, inventory, source_folder, storage_dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file, contents in entries.items():
            _write_file(staging / file, contents)
        _write_configs(source_folder, staging, entries, source_files)
        staging.chmod(0o755)
        sync_path(staging)
        _replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _inventory(folder: Path, files: Sequence[Path] | None) -> dict[str, StoredTensor]:
    if files is None:
        return read_inventory(folder)
    with suppress(SourceError):
        # Files of the folder itself that hold only what is never loaded belong to it all the same.
        whole = read_inventory(folder)
        if set(files) <= {Path(tensor.file) for tensor in whole.values()}:
            return whole
    return {key: tensor for file in files for key, tensor in read_file_header(file).items()}


def _pair(
    spec: ComponentSpec,
    module: nn.Module,
    inventory: Mapping[str, StoredTensor],
    folder: Path,
    storage_dtype: torch.dtype | None,
) -> dict[str, list[_Entry]]:
    """File -> entries: each published tensor with its trained values, if it has any."""
    trained = module.state_dict()
    unsaved = set(trained)
    entries: dict[str, list[_Entry]] = {}
    for key, stored, name in _published(spec, inventory):
        values = None if name is None else trained.get(name)
        if name is not None and (values is None or tuple(values.shape) != tuple(stored.shape)):
            found = "nothing" if values is None else f"shape {tuple(values.shape)}"
            raise PlanError(
                f"the trained {spec.subfolder} has no {name} of shape {tuple(stored.shape)}",
                where=stored.file,
                found=found,
            )
        unsaved.discard(name or "")
        dtype_name = stored.dtype
        if values is not None:
            dtype = storage_dtype or _DTYPES.get(stored.dtype, torch.bfloat16)
            dtype_name = _NAMES[dtype]
        file = _file_name(spec, stored, folder, is_published=key == stored.key)
        entry = _Entry(key, stored, Path(stored.file), values, dtype_name)
        entries.setdefault(file, []).append(entry)
    if unsaved:
        raise PlanError(
            f"the published {spec.subfolder} has no place for {', '.join(sorted(unsaved)[:5])}",
            where=str(folder),
            hint="only a component that trains in full is saved so; a LoRA is saved by itself",
        )
    return entries


def _published(
    spec: ComponentSpec, inventory: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, StoredTensor, str | None]]:
    """Key to write, stored tensor and name in the module, which what the family never loads lacks.

    Scales beside FP8 weights are left out, for the trained ones have none.
    """
    published = read_component(inventory, spec)
    if any(stored.key != key for key, stored in published.tensors.items()):
        for key, stored in published.tensors.items():
            yield key, stored, module_name(key, spec)
        return
    for key, stored in inventory.items():
        if key in published.tensors or module_name(key, spec) is None:
            yield key, stored, module_name(key, spec)


def _file_name(
    spec: ComponentSpec, stored: StoredTensor, folder: Path, *, is_published: bool
) -> str:
    """File to write a tensor to: the name alone, so that nothing can be written outside the new folder."""
    file = Path(stored.file)
    if not is_published or file.parent != folder:
        is_diffusers = spec.kind[0] == "_class_name"
        return f"{'diffusion_pytorch_model' if is_diffusers else 'model'}.safetensors"
    variant = file_variant(file.name)
    return file.name if variant is None else file.name.replace(f".{variant}", "", 1)


def _write_file(path: Path, entries: Sequence[_Entry]) -> None:
    """Write one safetensors file: header length (8 bytes), JSON header, then the tensors' bytes."""
    # Wide elements first, so that every tensor starts at a multiple of its element's size.
    ordered = sorted(entries, key=lambda e: (-e.num_bytes // max(1, prod(e.stored.shape)), e.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        header[entry.key] = {
            "dtype": entry.dtype_name,
            "shape": list(entry.stored.shape),
            "data_offsets": [position, position + entry.num_bytes],
        }
        position += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            _write_tensor(file, entry)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, entry: _Entry) -> None:
    if entry.values is not None:
        values = entry.values.detach().to("cpu", _DTYPES[entry.dtype_name]).contiguous()
        file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        return
    with entry.source.open("rb") as source:
        source.seek(entry.stored.start)
        left = entry.num_bytes
        while left:
            chunk = source.read(min(left, _COPY_BYTES))
            if not chunk:
                raise PlanError(f"{entry.key} is cut short", where=str(entry.source))
            file.write(chunk)
            left -= len(chunk)


def _write_configs(
    source: Path,
    staging: Path,
    entries: Mapping[str, Sequence[_Entry]],
    source_files: Sequence[Path] | None,
) -> None:
    """Copy the published configs; where weights were in several files, write an index of them."""
    for path in sorted(source.glob("*.json")):
        if ".safetensors.index" not in path.name:
            shutil.copyfile(path, staging / path.name)
            sync_path(staging / path.name)
    first = min(entries)
    plain = _SHARD.sub("", first)
    if plain == first:
        return
    variant = None if source_files is None else file_variant(source_files[0].name)
    index = find_index(source, variant=variant)
    said = {} if index is None else json.loads(index.read_text(encoding="utf-8"))
    total = sum(entry.num_bytes for contents in entries.values() for entry in contents)
    said["metadata"] = {**(said.get("metadata") or {}), "total_size": total}
    said["weight_map"] = {
        entry.key: file for file, contents in sorted(entries.items()) for entry in contents
    }
    target = staging / f"{plain}.index.json"
    target.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    sync_path(target)


def _replace_folder(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; an older `folder` steps aside first and is then deleted."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        folder.rename(aside / folder.name)
        staging.rename(folder)
        shutil.rmtree(aside)
    else:
        staging.rename(folder)
    sync_path(folder.parent)
