"""Makes one component of a plan real: built on the meta device, streamed in, encoded, adapter attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from framework.errors import PlanError, SourceError
from framework.hub import fetch_place
from framework.plan.types import (
    ComponentPlan,
    TensorGroup,
    TensorPlan,
    scale_shape,
)
from framework.plan.units import SlotPlan, component_units, rests_as_published
from framework.runtime.adapters import attach_lora_, is_adapter_name, load_lora_, load_preset_
from framework.runtime.empty import empty_parameters
from framework.runtime.host_memory import give_back
from framework.runtime.sources import RESTING_DTYPES, TensorSource, match_files, read_resting
from framework.storage.fetching import Fetcher, LayerSource, Parcel, Unit
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
    with _host_as_default():
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
            if plan.lora.preset is not None:
                load_preset_(module, Path(plan.lora.preset.path), plan.name)
            if plan.lora.init_from is not None:
                _start_from_file_(module, Path(plan.lora.init_from), plan.name)
    give_back()
    return module


def _host_as_default() -> AbstractContextManager[object]:
    """Inside, tensors made without a device are on the host, as what a module computes of itself (rotary frequencies).

    Trainers load with the GPU as torch's default device. Where it is the host already, nothing is done: to set it
    takes a call in Python for each of the tens of thousands of operations in a load.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


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
    sources = match_files(plan, folder)
    on_disk = plan.offload == "disk"
    wanted = [s for s in sources if not (on_disk and s.group.moves and not _needs_a_look(s))]
    with closing(read_resting(wanted, device, on_progress)) as weights:
        # The first one is asked for early: what follows is then read while the module is built.
        first = next(weights, None)
        module = _build(plan, family, folder)
        stores: dict[str, Store] = dict(_stores(plan, sources, device))
        slots = _prepare_(module, plan, compute_dtype, fetcher, stores)
        for source, weight in chain(() if first is None else (first,), weights):
            if not source.group.moves:
                _place_(module, source.group, source.tensor, weight)
            elif not on_disk:
                parcel, slot = slots[source.tensor.layer]
                store = stores[parcel]
                assert isinstance(store, HostStore)
                fill_slot(store, slot, weight)
    _move_buffers_(module, device)
    return module


def _build(plan: ComponentPlan, family: ModuleBuilder, folder: Path) -> nn.Module:
    """The module, its parameters on the meta device; it must be the one that the plan was made for."""
    with empty_parameters():
        module = family.build_module(plan.name, folder)
    _check_complete(plan, module)
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
    module = _build(plan, family, folder)
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


def _needs_a_look(source: TensorSource) -> bool:
    """Whether codes that stay on disk must be searched for NaN once: others wrote them, and decoding doesn't see it."""
    return source.group.scaling is not None and not source.is_own


def _stores(
    plan: ComponentPlan,
    sources: list[TensorSource],
    device: torch.device,
) -> Iterable[tuple[str, Store]]:
    """Parcel name -> where it rests, memory still without content."""
    parcels = [parcel for unit in component_units(plan) for parcel in unit.parcels]
    names = [parcel.name for parcel in parcels]
    if plan.offload == "host":
        sizes = [parcel.num_bytes for parcel in parcels]
        yield from zip(names, host_stores(sizes, pinned=device.type == "cuda"), strict=True)
    elif plan.offload == "disk":
        files = {source.tensor.name: source for source in sources}
        for parcel in parcels:
            ranges = [part for slot in parcel.slots for part in _ranges(slot, files)]
            yield parcel.name, DiskStore(parcel.num_bytes, ranges)


def _ranges(slot: SlotPlan, files: Mapping[str, TensorSource]) -> Iterable[FileRange]:
    """Where a weight, and the scale beside it, lie in the files; they rest there as they are used."""
    stored, scale = files[slot.tensor.name].stored, files[slot.tensor.name].scale
    yield FileRange(stored.file, stored.start, stored.num_bytes, slot.offset)
    if slot.scale_offset is not None:
        assert scale is not None
        yield FileRange(scale.file, scale.start, scale.num_bytes, slot.scale_offset)


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
        dtype=RESTING_DTYPES[group.states.offload.storage_dtype],
        offset=planned.offset,
        scale_shape=scale_shape(shape, group.scaling, group.block_shape),
        scale_offset=planned.scale_offset,
        block_shape=group.block_shape,
    )


def _start_from_file_(module: nn.Module, path: Path, component: str) -> None:
    if not load_lora_(module, path.expanduser(), component, is_meant=True):
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
            where=plan.weights_place,
            found="; ".join(problems[:5]) + more,
            hint="config.json and weights must be of one and the same model",
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
    module: nn.Module, group: TensorGroup, tensor: TensorPlan, weight: StoredWeight
) -> None:
    """Put one tensor where it rests on the device."""
    owner = module.get_submodule(tensor.layer)
    if group.scaling is not None:
        assert isinstance(owner, ManagedWeight)
        owner.store_(weight.values, weight.dequant_scale)
        return
    _put_(owner, tensor, weight.values, trains=group.trains)


def _place_empty_(
    module: nn.Module, group: TensorGroup, tensor: TensorPlan, device: torch.device
) -> None:
    """Memory of the tensor's size where it will rest."""
    owner = module.get_submodule(tensor.layer)
    dtype = RESTING_DTYPES[group.states.onload.storage_dtype]
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


def _move_buffers_(module: nn.Module, device: torch.device) -> None:
    """Bring buffers that the module computed itself (rotary frequencies) to the device, in their own number format."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device != device:
                owner._buffers[name] = buffer.to(device)
