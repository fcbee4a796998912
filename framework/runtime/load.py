"""Makes one component of a plan real: built on the meta device, streamed in, encoded, adapter attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from framework.errors import PlanError, SourceError
from framework.hub import fetch_place
from framework.inventory import StoredTensor, read_file_header, read_inventory
from framework.plan.types import (
    ComponentPlan,
    StorageDtype,
    TensorGroup,
    TensorPlan,
    scale_shape,
)
from framework.plan.units import SlotPlan, component_units, rests_as_published
from framework.runtime.adapters import attach_lora_, is_adapter_name, load_lora_
from framework.runtime.streaming import read_tensors
from framework.storage.fetching import Fetcher, LayerSource, Parcel, Unit
from framework.storage.fp8 import encode_e4m3, has_nan_codes
from framework.storage.managed import ManagedWeight, convert_layer_, offload_layer_
from framework.storage.stores import (
    DiskStore,
    EmptyStore,
    FileRange,
    HostStore,
    Slot,
    Store,
    fill_slot,
    host_stores,
)
from framework.storage.weights import StoredWeight

_TORCH_DTYPES: dict[StorageDtype, torch.dtype] = {
    "fp8_e4m3": torch.uint8,  # codes are held as bytes
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


class ModuleBuilder(Protocol):
    """The one thing that loading asks of a model family (`framework.models.base.Family` has it)."""

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build a component from `folder/config.json`, weights not read."""
        ...


def load_component(
    plan: ComponentPlan,
    family: ModuleBuilder,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int = 0,
    fetcher: Fetcher | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Load one component as the plan says, weights fetched from the hub first if they aren't on this machine.

    fetcher: brings offloaded weights to `device`; components that share it share its room. None makes one.
    compute_dtype: what an FP8 weight is decoded to where nothing else decides (embeddings).
    seed: of the adapter's start values, which are the same for every device and every storage of the base.
    on_progress: called with the bytes read since the last call.
    Only what trains has requires_grad; a frozen component is in eval mode, one that trains in train mode.
    Memory: the resting bytes plus the largest tensor. Weights that rest on disk aren't read.
    Raises PlanError where checkpoint and module don't agree, SourceError for files that can't be used.
    """
    folder = fetch_place(plan.folder)
    if plan.converted_dir is not None and not rests_as_published(plan):
        from framework.runtime.converted import use_converted

        plan = use_converted(plan, Path(plan.converted_dir), device=device, on_progress=on_progress)
    # Trainers call this with the GPU as torch's default device; the read buffer and what the module computes of itself
    # (rotary frequencies) belong on the host, there and everywhere else.
    with torch.device("cpu"):
        module = _load_weights(
            plan,
            family,
            folder,
            device=device,
            compute_dtype=compute_dtype,
            fetcher=fetcher or Fetcher(device),
            on_progress=on_progress,
        )
        module.requires_grad_(plan.trainable == "full")
        module.train(plan.trainable == "full")
        if plan.lora is not None:
            attach_lora_(
                module, plan.lora, component=plan.name, seed=seed, trains=plan.trainable == "lora"
            )
            if plan.lora.init_from is not None:
                _start_from_file_(module, Path(plan.lora.init_from), plan.name)
    return module


def _load_weights(
    plan: ComponentPlan,
    family: ModuleBuilder,
    folder: Path,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    fetcher: Fetcher,
    on_progress: Callable[[int], None] | None,
) -> nn.Module:
    """Build the module without weights and fill it tensor by tensor."""
    with init_empty_weights(include_buffers=False):
        module = family.build_module(plan.name, folder)
    sources = _match_files(plan, folder)
    _check_complete(plan, module)
    stores: dict[str, Store] = dict(_stores(plan, sources, device))
    slots = _prepare_(module, plan, compute_dtype, fetcher, stores)
    planned = {source.key: pair for source, pair in sources}
    on_disk = {tensor.name for tensor in _moving(plan)} if plan.offload == "disk" else set()
    wanted = [source for source, (_, tensor) in sources if tensor.name not in on_disk]
    for stored, values in read_tensors(wanted):
        group, tensor = planned[stored.key]
        if group.moves:
            parcel, slot = slots[tensor.layer]
            store = stores[parcel]
            assert isinstance(store, HostStore)
            fill_slot(store, slot, _resting(group, tensor, values, device))
        else:
            _place_(module, group, tensor, values, device)
        if on_progress is not None:
            on_progress(stored.num_bytes)
    _move_buffers_(module, device)
    return module


def build_skeleton(
    plan: ComponentPlan,
    family: ModuleBuilder,
    folder: Path,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    fetcher: Fetcher,
) -> nn.Module:
    """The module as `load_component` would make it, with memory instead of weights and without an adapter.

    For counting: run it under FakeTensorMode, where nothing is allocated, with a fetcher made for a rehearsal.
    Reads headers and config.json only.
    """
    with init_empty_weights(include_buffers=False):
        module = family.build_module(plan.name, folder)
    _check_complete(plan, module)
    stores: dict[str, Store] = {
        parcel.name: EmptyStore(parcel.num_bytes, reads_files=plan.offload == "disk")
        for unit in component_units(plan)
        for parcel in unit.parcels
    }
    _prepare_(module, plan, compute_dtype, fetcher, stores)
    for group in plan.groups:
        for tensor in () if group.moves else group.tensors:
            _place_empty_(module, group, tensor, device)
    _move_buffers_(module, device)
    module.requires_grad_(plan.trainable == "full")
    module.train(plan.trainable == "full")
    return module


def _moving(plan: ComponentPlan) -> list[TensorPlan]:
    return [tensor for group in plan.groups if group.moves for tensor in group.tensors]


def _stores(
    plan: ComponentPlan,
    sources: list[tuple[StoredTensor, tuple[TensorGroup, TensorPlan]]],
    device: torch.device,
) -> Iterable[tuple[str, Store]]:
    """Parcel name -> where it rests, memory still without content."""
    parcels = [parcel for unit in component_units(plan) for parcel in unit.parcels]
    names = [parcel.name for parcel in parcels]
    if plan.offload == "host":
        sizes = [parcel.num_bytes for parcel in parcels]
        yield from zip(names, host_stores(sizes, pinned=device.type == "cuda"), strict=True)
    elif plan.offload == "disk":
        files = {tensor.name: stored for stored, (_, tensor) in sources}
        for parcel in parcels:
            ranges = [part for slot in parcel.slots for part in _ranges(slot, files)]
            yield parcel.name, DiskStore(parcel.num_bytes, ranges)


def _ranges(slot: SlotPlan, files: Mapping[str, StoredTensor]) -> Iterable[FileRange]:
    """Where a weight, and the scale beside it, lie in the files; they rest there as they are used."""
    stored = files[slot.tensor.name]
    yield FileRange(stored.file, stored.start, stored.num_bytes, slot.offset)
    scale = slot.tensor.published_scale
    if slot.scale_offset is not None:
        assert scale is not None
        found = read_file_header(Path(scale.file))[scale.key]
        yield FileRange(found.file, found.start, found.num_bytes, slot.scale_offset)


def _prepare_(
    module: nn.Module,
    plan: ComponentPlan,
    compute_dtype: torch.dtype,
    fetcher: Fetcher,
    stores: Mapping[str, Store],
) -> dict[str, tuple[str, Slot]]:
    """Turn the layers that need it into managed ones, still on the meta device.

    Returns for each layer that is offloaded its parcel and its place there.
    """
    for group in plan.groups:
        if group.scaling is not None and not group.moves:
            _convert_group_(module, group, compute_dtype)
    groups = {group.name: group for group in plan.groups}
    places: dict[str, tuple[str, Slot]] = {}
    for planned in component_units(plan):
        parcels = []
        for parcel in planned.parcels:
            slots = {slot.tensor.layer: _slot(slot, groups[slot.group]) for slot in parcel.slots}
            places |= {layer: (parcel.name, slot) for layer, slot in slots.items()}
            parcels.append(Parcel(stores[parcel.name], slots))
        unit = Unit(planned.name, plan.name, parcels, ahead=plan.granularity != "model")
        for parcel in planned.parcels:
            for slot in parcel.slots:
                with _told(slot.tensor.layer, f"set model.{plan.name}.offload=none"):
                    layer = module.get_submodule(slot.tensor.layer)
                    source = LayerSource(fetcher, unit, slot.tensor.layer)
                    offload_layer_(layer, source, weight_dtype=compute_dtype)
    return places


def _slot(planned: SlotPlan, group: TensorGroup) -> Slot:
    shape = planned.tensor.shape
    return Slot(
        shape=shape,
        dtype=_TORCH_DTYPES[group.states.offload.storage_dtype],
        offset=planned.offset,
        scale_shape=scale_shape(shape, group.scaling, group.block_shape),
        scale_offset=planned.scale_offset,
        block_shape=group.block_shape,
    )


def _start_from_file_(module: nn.Module, path: Path, component: str) -> None:
    if not load_lora_(module, path.expanduser(), component):
        raise SourceError(
            f"the LoRA file holds no adapter for {component}",
            where=str(path),
            hint=f"correct model.{component}.lora.init_from, or unset it",
        )


def resting_bytes(module: nn.Module) -> int:
    """Bytes that the component's own weights take: parameters and persistent buffers, adapters not counted.

    Storage that several tensors share counts once.
    """
    seen: dict[int, int] = {}
    for name, tensor in _state(module):
        if not is_adapter_name(name):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the module; empty where no adapter is attached."""
    return {name: p for name, p in module.named_parameters() if is_adapter_name(name)}


def _state(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    persistent = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield name, buffer


def _match_files(
    plan: ComponentPlan, folder: Path
) -> list[tuple[StoredTensor, tuple[TensorGroup, TensorPlan]]]:
    """Pair planned tensors with the files as they are now; they must not have changed since the plan was made."""
    inventory = _inventory(plan, folder)
    pairs = []
    for group in plan.groups:
        for tensor in group.tensors:
            stored = inventory.get(tensor.source_key)
            if stored is None or (stored.shape, stored.dtype) != (
                tensor.shape,
                tensor.source_dtype,
            ):
                found = f"{stored.dtype} {list(stored.shape)}" if stored else "no such tensor"
                raise PlanError(
                    f"the files of {plan.name} changed since the plan was made: {tensor.source_key}",
                    where=str(folder),
                    found=found,
                    hint="run the command again",
                )
            pairs.append((stored, (group, tensor)))
    return pairs


def _inventory(plan: ComponentPlan, folder: Path) -> dict[str, StoredTensor]:
    """Key -> tensor of all files that the plan names: those of the folder, or one in a folder of converted weights."""
    files = {tensor.file for group in plan.groups for tensor in group.tensors}
    elsewhere = {f for f in files if Path(f).is_absolute() and Path(f).parent != folder}
    inventory = {} if elsewhere == files else read_inventory(folder)
    for file in sorted(elsewhere):
        inventory |= read_file_header(Path(file))
    return inventory


def _check_complete(plan: ComponentPlan, module: nn.Module) -> None:
    """The module and the checkpoint must hold the same tensors of the same shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _state(module)}
    offered = {tensor.name: tensor.shape for group in plan.groups for tensor in group.tensors}
    problems = [
        *(f"{name} is missing in the checkpoint" for name in wanted if name not in offered),
        *(f"{name} has no place in the module" for name in offered if name not in wanted),
        *(
            f"{name} is {list(offered[name])} in the checkpoint, {list(shape)} in the module"
            for name, shape in wanted.items()
            if name in offered and offered[name] != shape
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise PlanError(
            f"the weights of {plan.name} don't fit its config.json",
            where=plan.folder,
            found="; ".join(problems[:5]) + more,
            hint="the folder must hold config.json and weights of one and the same model",
        )


def _convert_group_(module: nn.Module, group: TensorGroup, compute_dtype: torch.dtype) -> None:
    """Turn the layers of an FP8 group that rests on the device into managed ones."""
    assert group.scaling is not None
    for tensor in group.tensors:
        with _told(tensor.layer, "name the layer in fp8.keep_high_precision of its component"):
            convert_layer_(
                module.get_submodule(tensor.layer),
                scaling=group.scaling,
                block_shape=group.block_shape,
                weight_dtype=compute_dtype,
            )


@contextmanager
def _told(layer: str, hint: str) -> Iterator[None]:
    """Say which layer no managed layer can stand for."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise PlanError(f"{layer}: {error}", hint=hint) from error


def _place_(
    module: nn.Module, group: TensorGroup, tensor: TensorPlan, values: Tensor, device: torch.device
) -> None:
    """Copy one tensor out of the read buffer to where it rests on the device."""
    owner = module.get_submodule(tensor.layer)
    stored = _resting(group, tensor, values, device)
    if group.scaling is not None:
        assert isinstance(owner, ManagedWeight)
        owner.store_(stored.values.to(device), _to(stored.dequant_scale, device))
        return
    _put_(owner, tensor, stored.values.to(device), trains=group.trains)


def _place_empty_(
    module: nn.Module, group: TensorGroup, tensor: TensorPlan, device: torch.device
) -> None:
    """Memory of the tensor's size where it will rest."""
    owner = module.get_submodule(tensor.layer)
    dtype = _TORCH_DTYPES[group.states.onload.storage_dtype]
    values = torch.empty(tensor.shape, dtype=dtype, device=device)
    if group.scaling is None:
        _put_(owner, tensor, values, trains=group.trains)
        return
    assert isinstance(owner, ManagedWeight)
    shape = scale_shape(tensor.shape, group.scaling, group.block_shape)
    scale = None if shape is None else torch.empty(shape, dtype=torch.float32, device=device)
    owner.store_(values, scale)


def _put_(owner: nn.Module, tensor: TensorPlan, values: Tensor, *, trains: bool) -> None:
    leaf = tensor.name.rpartition(".")[2]
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(values, requires_grad=trains)
    else:
        owner._buffers[leaf] = values


def _resting(
    group: TensorGroup, tensor: TensorPlan, values: Tensor, device: torch.device
) -> StoredWeight:
    """A tensor of a file in the form in which it rests; encoded on the device, where that is faster."""
    if group.scaling is not None:
        codes, scale = _encode(group, tensor, values, device)
        return StoredWeight(codes, scale, group.block_shape)
    dtype = _TORCH_DTYPES[group.states.onload.storage_dtype]
    if group.moves:  # copied where it is put
        return StoredWeight(values.to(dtype))
    return StoredWeight(values.to(device=device, dtype=dtype, copy=True))


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _encode(
    group: TensorGroup, tensor: TensorPlan, values: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Codes and scale on the device, encoded there. What is FP8 in the file is kept as it is."""
    # Apple's GPU knows no FP8: the host encodes for it.
    values = values.to("cpu" if device.type == "mps" else device)
    if group.scaling == "none" and tensor.source_dtype == "F8_E4M3":
        codes = values.view(torch.uint8).clone()
        if has_nan_codes(codes):
            raise PlanError(f"{tensor.source_key} holds NaN", where=tensor.file)
        return codes.to(device), None
    assert group.scaling is not None
    try:
        codes, scale = encode_e4m3(values, group.scaling)
        return codes.to(device), None if scale is None else scale.to(device)
    except ValueError as error:
        hint = "set fp8.scaling=row" if group.scaling == "none" else "the checkpoint is damaged"
        raise PlanError(f"{tensor.source_key}: {error}", where=tensor.file, hint=hint) from error


def _move_buffers_(module: nn.Module, device: torch.device) -> None:
    """Bring buffers that the module computed itself (rotary frequencies) to the device, in their own number format."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)
