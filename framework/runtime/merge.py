"""Writes a whole checkpoint in the published layout with adapters merged into its weights.

One tensor is in memory at a time: its weight in float32, what is added to it, and what is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from framework.atomic import sync_path
from framework.errors import PlanError, SourceError
from framework.hub import fetch_place, find_folder, locate_extra
from framework.inventory import StoredTensor, file_variant, read_file_header, read_inventory
from framework.plan.build import build_inference_plan
from framework.plan.match import matches_any, module_name, tensor_kind
from framework.plan.native_names import read_component
from framework.plan.types import ComponentPlan
from framework.runtime.lora_files import Adapters, named_as_here
from framework.runtime.lora_fusing import LayerAdapter
from framework.runtime.sources import match_files, read_resting
from framework.runtime.streamed_file import Entry, ShardWriter
from framework.schema.families import FAMILIES, ComponentSpec
from framework.schema.model import ModelConfig
from framework.storage.fp8 import encode_e4m3

MergePrecision = Literal["bf16", "fp8"]
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
_INDEX = ".safetensors.index"


@dataclass(frozen=True)
class MergePlan:
    """What merging will do.

    total_bytes: to be read.   parts: components in the order in which they are written.
    trained: component -> folder of weights that a run trained in full, which are taken as they are.
    """

    model: ModelConfig
    parts: tuple[ComponentPlan, ...]
    adapters: Adapters
    precision: MergePrecision
    trained: Mapping[str, Path]

    @property
    def total_bytes(self) -> int:
        """To be read of all components."""
        return sum(part.source_bytes for part in self.parts)


def plan_merge(
    model: ModelConfig,
    adapters: Adapters,
    *,
    precision: MergePrecision = "bf16",
    trained: Mapping[str, Path] | None = None,
) -> MergePlan:
    """Find the checkpoint and check that every adapter fits; reads headers only.

    Raises SourceError for a checkpoint that can't be used, or layers that it doesn't have in these shapes.
    """
    # Weights come out of their files one by one in float32, whatever the run stored them in.
    plain = {"precision": "bf16", "offload": "none", "trainable": "none", "lora": None}
    sections = {
        name: part.model_copy(update=plain).model_dump(exclude_defaults=True)
        for name, part in model.components.items()
    }
    changed = {
        **model.model_dump(exclude=set(sections), exclude_none=True),
        **sections,
        "compute_dtype": "fp32",
        "converted_dir": None,
        "fit": None,
    }
    bare = ModelConfig.model_validate(changed)
    plan = build_inference_plan(bare, device="cpu")
    fitting: Adapters = {}
    for component, layers in adapters.items():
        weights = {
            tensor.layer: tensor.shape
            for group in plan.component(component).groups
            for tensor in group.tensors
            if tensor.name.endswith(".weight")
        }
        fitting[component] = named_as_here(layers, weights)
        _check_fit(component, fitting[component], weights)
    return MergePlan(bare, plan.components, fitting, precision, trained or {})


def write_merged(
    plan: MergePlan, folder: Path, *, on_progress: Callable[[int], None] | None = None
) -> None:
    """Write the whole checkpoint; it appears at once when all of it is written.

    folder: must not exist.   on_progress: called with the bytes read since the last call.
    Memory: the largest tensor three times, in float32.
    Raises PlanError where `folder` exists, SourceError for files that can't be read.
    """
    if folder.exists():
        raise PlanError(
            "the folder for the merged checkpoint exists, and nothing is written over",
            where=str(folder),
            hint="name a folder that doesn't exist with --out",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    progress = on_progress or (lambda count: None)
    try:
        spec = FAMILIES[plan.model.family]
        for part in plan.parts:
            target = staging / spec.components[part.name].subfolder
            if part.name in plan.trained:
                shutil.copytree(plan.trained[part.name], target)
                progress(part.source_bytes)
            else:
                _write_component(part, spec.components[part.name], plan, target, progress)
        for name in spec.extras.values():
            _copy_small(
                locate_extra(plan.model.source, name, revision=plan.model.revision), staging / name
            )
        _copy_model_index(plan, staging)
        staging.chmod(0o755)
        sync_path(staging)
        staging.rename(folder)
        sync_path(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_fit(
    component: str, layers: Mapping[str, LayerAdapter], weights: Mapping[str, tuple[int, ...]]
) -> None:
    for name, adapter in layers.items():
        shape = (adapter.up.shape[0], *adapter.down.shape[1:])
        if weights.get(name) != shape:
            raise SourceError(
                f"the LoRA doesn't fit the checkpoint: {component}.{name}",
                found=f"a weight {list(weights[name])}, not {list(shape)}"
                if name in weights
                else "no such layer",
                hint="the LoRA was made for another model",
            )


def _write_component(
    part: ComponentPlan,
    spec: ComponentSpec,
    plan: MergePlan,
    target: Path,
    progress: Callable[[int], None],
) -> None:
    """One component: merged, or copied as it is where nothing is to be merged and its files are as published."""
    folder = fetch_place(part.folder)
    layers = plan.adapters.get(part.name, {})
    _copy_small(folder, target, without_indexes=True)
    layout = _Layout(part, spec, folder)
    if not layers and layout.is_published:
        for file in layout.files:
            shutil.copyfile(file, target / _plain_name(file.name))
            sync_path(target / _plain_name(file.name))
        _write_index(target, layout.copied_places())
        progress(part.source_bytes)
        return
    precision = plan.precision if layers else None
    writer = ShardWriter(target, layout.entries(precision))
    with writer:
        for source, weight in read_resting(match_files(part, folder), torch.device("cpu")):
            name = source.tensor.name
            values = weight.values
            if source.tensor.layer in layers and name.endswith(".weight"):
                values = layers[source.tensor.layer].merged(values)
            for entry, tensor in layout.written(name, values, writer.entries):
                writer.write(entry, tensor)
            progress(source.stored.num_bytes)
        for key, stored in layout.extras.items():
            writer.copy(writer.entries[key], stored)
    _write_index(target, writer.places())


class _Layout:
    """Under which keys, and in which files, the tensors of a component are written.

    files: with its weights, also those of which nothing is loaded.
    extras: key -> tensor that the family never loads, which is copied (a vision tower, say).
    """

    def __init__(self, part: ComponentPlan, spec: ComponentSpec, folder: Path) -> None:
        self._spec = spec
        loaded = part.source_files(folder)
        if all(file.parent == folder for file in loaded):
            inventory = read_inventory(folder, variant=file_variant(loaded[0].name))
        else:
            inventory = {k: t for file in loaded for k, t in read_file_header(file).items()}
        self.files = sorted({Path(tensor.file) for tensor in inventory.values()})
        published = read_component(inventory, spec)
        self._keys = {str(module_name(key, spec)): key for key in published.tensors}
        self._stored = published.tensors
        translated = any(stored.key != key for key, stored in published.tensors.items())
        self.is_published = not translated and all(file.parent == folder for file in self.files)
        self.extras: dict[str, StoredTensor] = {}
        if not translated:
            self.extras = {k: t for k, t in inventory.items() if module_name(k, spec) is None}
        self._inventory = inventory

    def entries(self, precision: MergePrecision | None) -> Iterator[Entry]:
        """precision: None keeps each tensor's number format; of weights in FP8 none is kept."""
        for name, key in self._keys.items():
            stored = self._stored[key]
            file = self._file_of(stored)
            if precision == "fp8" and self._is_encoded(name, stored.shape):
                yield Entry(key, "F8_E4M3", stored.shape, file)
                scale = (stored.shape[0], *(1 for _ in stored.shape[1:]))
                yield Entry(_scale_key(key), "F32", scale, file)
            else:
                kept = stored.dtype if precision is None else "BF16"
                yield Entry(key, "BF16" if kept.startswith("F8") else kept, stored.shape, file)
        for key, stored in self.extras.items():
            yield Entry(key, stored.dtype, stored.shape, self._file_of(stored))

    def written(
        self, name: str, values: torch.Tensor, entries: Mapping[str, Entry]
    ) -> Iterator[tuple[Entry, torch.Tensor]]:
        """What is written of one weight: itself, or its codes and their scale."""
        key = self._keys[name]
        entry = entries[key]
        if entry.dtype != "F8_E4M3":
            yield entry, values
            return
        codes, scale = encode_e4m3(values, "row")
        assert scale is not None
        yield entry, codes
        beside = entries[_scale_key(key)]
        yield beside, scale.reshape(beside.shape)

    def copied_places(self) -> dict[str, tuple[str, int]]:
        """Key -> file and bytes, where the files are copied."""
        return {
            key: (_plain_name(Path(stored.file).name), stored.num_bytes)
            for key, stored in self._inventory.items()
        }

    def _is_encoded(self, name: str, shape: tuple[int, ...]) -> bool:
        layer = name.rpartition(".")[0]
        return tensor_kind(name, shape, self._spec) == "linear" and not matches_any(
            layer, self._spec.keep_high_precision
        )

    def _file_of(self, stored: StoredTensor) -> str:
        if self.is_published:
            return _plain_name(Path(stored.file).name)
        is_diffusers = self._spec.kind[0] == "_class_name"
        return f"{'diffusion_pytorch_model' if is_diffusers else 'model'}.safetensors"


def _scale_key(key: str) -> str:
    return f"{key.removesuffix('weight')}scale_weight"


def _plain_name(name: str) -> str:
    """A file's name without the variant in it."""
    variant = file_variant(name)
    return name if variant is None else name.replace(f".{variant}", "", 1)


def _write_index(target: Path, places: Mapping[str, tuple[str, int]]) -> None:
    """An index, where the weights are in several files."""
    files = sorted({file for file, _ in places.values()})
    if len(files) < 2:
        return
    said = {
        "metadata": {"total_size": sum(size for _, size in places.values())},
        "weight_map": {key: file for key, (file, _) in sorted(places.items())},
    }
    plain = files[0].split("-000")[0]
    path = target / f"{plain}{_INDEX}.json"
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    sync_path(path)


def _copy_small(folder: Path, target: Path, *, without_indexes: bool = False) -> None:
    """Configurations, vocabularies and templates of a folder, and of those inside it."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _SMALL_FILES:
        for path in sorted(folder.glob(pattern)):
            if not (without_indexes and _INDEX in path.name):
                shutil.copyfile(path, target / path.name)
                sync_path(target / path.name)


def _copy_model_index(plan: MergePlan, staging: Path) -> None:
    """The file by which diffusers knows which class each folder is for."""
    local = find_folder(plan.model.source)
    if local is not None:
        path = (local if local.is_dir() else local.parent) / "model_index.json"
    else:
        path = fetch_place(plan.parts[0].folder).parent / "model_index.json"
        commit = plan.parts[0].commit
        if not path.is_file() and commit is not None:
            path = _fetched_index(plan.model.source, commit)
    if path.is_file():
        shutil.copyfile(path, staging / path.name)
        sync_path(staging / path.name)


def _fetched_index(source: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    from framework.hub.remote import hub_errors, translate

    try:
        return Path(hf_hub_download(source, "model_index.json", revision=commit))
    except hub_errors() as error:
        raise translate(error, source, commit) from error
